"""Hooks on a decoder layer that collect what calibration needs while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantkit.calibration.statistics import InputStatistics, KeyStatistics
from quantkit.errors import QuantkitError
from quantkit.models.groups import LayerStructure
from quantkit.ranks import ALONE, Ranks


class Enough(Exception):
    """All of a forward that is watched has been seen: what is left of it gives an output that nobody asked for."""


@dataclass
class Watched:
    """What the hooks of `observe` collect.

    Attributes:
        inputs: input group's name -> its statistics.
        keys: those of the keys.
    """

    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    keys: KeyStatistics = field(default_factory=KeyStatistics)
    _order: list[str] = field(default_factory=list)
    _last: str | None = None

    def may_end_early(self) -> bool:
        """From now on a forward raises `Enough` behind the last input, if one is always the last.

        It is where every forward so far has seen every input once, in one order. Of experts the last may get no tokens later on:
        that forward does not end early.
        """
        if self._last is None:
            once = self._order[: len(self.inputs)]
            if sorted(once) == sorted(self.inputs):
                times = len(self._order) // len(once)
                self._last = once[-1] if self._order == once * times else None
        return self._last is not None

    def saw(self, name: str, x: torch.Tensor) -> None:
        """Take in a batch [..., K] of an input.

        Raises:
            Enough: it was the last.
        """
        self.inputs[name].update(x)
        if self._last is None:
            self._order.append(name)
        elif name == self._last:
            raise Enough


@contextmanager
def observe(
    layer: nn.Module,
    structure: LayerStructure,
    *,
    hessians: set[str],
    keep_rows: int,
    batches: int,
    products: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> Iterator[Watched]:
    """Hooks on a layer that collect statistics of every input group, and of the keys, while it runs.

    At the end of the context the statistics are those of all processes.

    Args:
        structure: the layer's.
        hessians: names of the input groups whose Hessian is needed.
        keep_rows: how many tokens of each input to keep.
        batches: how many batches will come, to all processes.
        products: as `LayerStream`'s.

    Raises:
        QuantkitError: an input was not finite.
    """
    seen = Watched()
    handles = []
    for group in structure.inputs:
        module = layer.get_submodule(group.watched)
        weight: Any = module.weight
        seen.inputs[group.name] = InputStatistics(
            weight.shape[1],
            hessian=group.name in hessians,
            # Factors are searched for groups alone.
            keep=keep_rows if group in structure.groups else 0,
            batches=batches,
            device=weight.device,
            products=products,
        )

        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = group.name) -> None:
            seen.saw(name, args[0])

        handles.append(module.register_forward_pre_hook(hook))
    attention: Any = layer.get_submodule(structure.attention.path)
    attention.key_observer = seen.keys.update
    try:
        yield seen
    finally:
        del attention.key_observer
        for handle in handles:
            handle.remove()
    for group in structure.inputs:
        if not seen.inputs[group.name].finite:
            raise QuantkitError(
                f"the inputs of {', '.join(group.linears)} are not finite on the calibration text: the model's own "
                "activations overflow, or a layer before was spoilt; quantkit verify tells of a damaged checkpoint"
            )
    for stats in seen.inputs.values():
        stats.combine(ranks)
    seen.keys.combine(ranks)
