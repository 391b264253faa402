"""Planting the outliers that large models have and small ones lack, without changing the model's function.

Quantization methods exist because of outliers: a few residual channels, a few channels of the gated product
and a few RoPE pairs of the keys are tens of times larger than the rest. A small trained model has none, so
every method looks the same on it. Each factor here is undone by the weight that reads what it scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantkit.models.groups import Attention, InputGroup
from quantkit.models.structure import build_skeleton, find_structure, load_config


class _Draw:
    """Seeded choices of channels and factors."""

    def __init__(self, factor: tuple[float, float], seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._low, self._high = (math.log(f) for f in factor)

    def channels(self, size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=self._generator)[:count]

    def factors(self, count: int) -> Tensor:
        """float64 [count], log-uniform."""
        unit = torch.rand(count, dtype=torch.float64, generator=self._generator)
        return torch.exp(self._low + unit * (self._high - self._low))


def plant_outliers(
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    *,
    factor: tuple[float, float] = (20.0, 60.0),
    channels: int = 4,
    pairs: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A state dict with outliers planted in every layer; the model computes what it did.

    Which tensors these are is read off the model's structure: norms that feed linears, the linear before
    down_proj (or fc2), queries and keys.

    Args:
        tensors: weights and biases, norms included, named as in a checkpoint.
        config: config.json's content.
        factor: the range of the factors, drawn log-uniformly.
        channels: outlier channels per norm and per gated product.
        pairs: outlier RoPE pairs per KV head.
        seed: of the choice.

    Returns:
        A new dictionary; tensors that changed are back in their own types.

    Raises:
        ValueError: a tensor that a factor must be undone in is missing, or the factor is no range.
        QuantkitError: the config is not valid, or of a structure that is not understood.
    """
    if not 0 < factor[0] <= factor[1]:
        raise ValueError(f"factor: {factor} is no range of positive numbers")
    structure = find_structure(build_skeleton(load_config(config, "config"), "config"), "config")
    draw = _Draw(factor, seed)
    # Everything in float64 until the end, so that each tensor is rounded once.
    wide = {name: t.double() for name, t in tensors.items() if name.startswith(structure.layers)}
    for number, layer in enumerate(structure.layer_structures):
        view = _Layer(wide, structure.prefix(number))
        for group in layer.groups:
            if group.place != "o" and group.feeder is not None:
                _plant(view, group, draw, channels)
        if not layer.attention.why_no_factors:
            _plant_keys(view, layer.attention, draw, pairs)
    changed = {name: t.to(tensors[name].dtype) for name, t in wide.items()}
    return tensors | changed


def _plant(view: _Layer, group: InputGroup, draw: _Draw, channels: int) -> None:
    """Channels of a group's input up in what feeds it, down in what reads it."""
    assert group.feeder is not None
    chosen = draw.channels(view.get(f"{group.linears[0]}.weight").shape[1], channels)
    up = draw.factors(len(chosen))
    rows = chosen if group.feeder.rows is None else group.feeder.rows[chosen]
    view.scale_rows(group.feeder.module, rows, up, group.feeder.offset)
    for reader in group.linears + group.others:
        view.scale_columns(reader, chosen, 1 / up)


def _plant_keys(view: _Layer, attention: Attention, draw: _Draw, pairs: int) -> None:
    """RoPE pairs of the keys up, of the queries that meet them down: both members by one factor, so RoPE agrees."""
    dim = attention.head_dim
    if attention.key_norm:
        # A norm after the projection would undo a factor before it; its own weight is shared by all heads.
        both, ups = _drawn_pairs(draw, dim, pairs)
        view.scale_rows(f"{attention.path}.k_norm", both, ups)
        view.scale_rows(f"{attention.path}.q_norm", both, 1 / ups)
        return
    assert attention.keys is not None
    assert attention.queries is not None
    group = attention.heads // attention.kv_heads
    for head in range(attention.kv_heads):
        both, ups = _drawn_pairs(draw, dim, pairs)
        view.scale_rows(attention.keys.module, attention.keys.rows[head, both], ups)
        for query in range(head * group, (head + 1) * group):
            view.scale_rows(attention.queries.module, attention.queries.rows[query, both], 1 / ups)


def _drawn_pairs(draw: _Draw, dim: int, pairs: int) -> tuple[Tensor, Tensor]:
    """(both members of each pair, their factors)."""
    chosen = draw.channels(dim // 2, pairs)
    up = draw.factors(len(chosen))
    return torch.cat([chosen, chosen + dim // 2]), torch.cat([up, up])


class _Layer:
    """The tensors of one decoder layer, changed in place."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def get(self, name: str) -> Tensor:
        if self._prefix + name not in self._tensors:
            raise ValueError(
                f"{self._prefix + name} is missing: its experts are stacked, or it is not complete"
            )
        return self._tensors[self._prefix + name]

    def scale_rows(self, module: str, rows: Tensor, by: Tensor, offset: float = 0.0) -> None:
        """A linear's output channels, or a norm's (which multiplies by weight + offset); a bias too."""
        weight = self.get(f"{module}.weight")
        by = by[:, None] if weight.ndim == 2 else by
        weight[rows] = (weight[rows] + offset) * by - offset
        if f"{self._prefix}{module}.bias" in self._tensors:
            self.get(f"{module}.bias")[rows] *= by.flatten()

    def scale_columns(self, module: str, columns: Tensor, by: Tensor) -> None:
        self.get(f"{module}.weight")[:, columns] *= by
