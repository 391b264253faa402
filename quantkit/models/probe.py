"""How data flows through one decoder layer, found by running it with its linears replaced by constants.

A layer's linears hold nearly all of its weights, so a layer of any size can be tried without any: each linear
notes its input and gives an output that was chosen beforehand. Which linears share an input, which norm or which
linear feeds another, in what order of rows, and whether a factor may pass between them, all shows in the numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.models.entry import LayerCall
from quantkit.models.experts import LinearExperts, is_linear

NAME = "quantkit_probe"
TOKENS = 3


class Constant(nn.Module):
    """Stands for a linear, or for all experts: gives a chosen output, notes its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.output = torch.zeros(TOKENS, out_features)
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen = x.detach().reshape(-1, x.shape[-1]).float()
        rows = self.seen.shape[0] // TOKENS
        return self.output.repeat(rows, 1).reshape(*x.shape[:-1], self.out_features).to(x.dtype)


@dataclass
class Attended:
    """What an attention layer handed to its attention function."""

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softcap: float | None = None


@dataclass
class Run:
    """One pass: what every linear read, what the layer gave."""

    inputs: dict[str, torch.Tensor]
    output: torch.Tensor
    norms: dict[str, torch.Tensor]
    attended: Attended | None


_attended: list[Attended] = []


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    _attended.append(Attended(module, query, key, value, kwargs.get("softcap")))
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    causal = bool(getattr(module, "is_causal", True))
    out = nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=causal
    )
    return out.transpose(1, 2).contiguous().to(query.dtype), None


def register() -> None:
    """Make the attention that notes what it is given known to transformers. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class ProbedLayer:
    """A decoder layer on the meta device, copied, with constants for its linears.

    Args:
        layer: of the skeleton; not changed.
        call: what the model calls it with for `TOKENS` tokens.
        hidden_size: of its input.

    Attributes:
        constants: linear's (or experts') name -> its constant.
        linears: name -> the linear of the skeleton's layer, those of experts among them.
        experts: name -> experts, which are one constant together.
        inputs: the layer's, [1, TOKENS, hidden size].
        norms: name -> offset, of the modules that normalise the last dimension and multiply by
            weight + offset.
    """

    def __init__(self, layer: nn.Module, call: LayerCall, hidden_size: int) -> None:
        self._layer = copy.deepcopy(layer)
        self._call = call
        self._generator = torch.Generator().manual_seed(0)
        self.constants: dict[str, Constant] = {}
        self.experts: dict[str, LinearExperts] = {}
        self.linears: dict[str, nn.Linear] = {
            name: module for name, module in layer.named_modules() if is_linear(module)
        }
        for name, module in list(self._layer.named_modules()):
            if isinstance(module, LinearExperts):
                self.experts[name] = module
                self._replace(name, Constant(module.hidden_size, module.hidden_size))
            elif is_linear(module) and not any(name.startswith(f"{e}.") for e in self.experts):
                self._replace(name, Constant(module.in_features, module.out_features))
        for module in self._layer.modules():
            for kind, parameter in list(module._parameters.items()):
                if parameter is not None:
                    value = self.random(*parameter.shape).abs() + 0.5
                    module._parameters[kind] = nn.Parameter(value, requires_grad=False)
        self.inputs = self.random(1, TOKENS, hidden_size)
        self.norms = {
            name: offset for name, module in self._layer.named_modules()
            if (offset := norm_offset(module)) is not None
        }  # fmt: skip
        self.randomize()

    def _replace(self, name: str, constant: Constant) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._layer.get_submodule(parent), child, constant)
        self.constants[name] = constant

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def module(self, name: str) -> Any:
        return self._layer.get_submodule(name)

    def randomize(self) -> None:
        """New outputs for all linears."""
        for constant in self.constants.values():
            constant.output = self.random(TOKENS, constant.out_features)

    @torch.no_grad()
    def run(self) -> Run:
        """One pass through the layer."""
        _attended.clear()
        norms: dict[str, torch.Tensor] = {}
        handles = [
            self.module(name).register_forward_hook(
                lambda _, __, output, name=name: norms.__setitem__(
                    name, output.detach().reshape(-1, output.shape[-1]).float()
                )
            )
            for name in self.norms
        ]
        read: dict[str, torch.Tensor] = {}
        readers = [
            module.register_forward_pre_hook(
                lambda _, args, name=name: read.__setitem__(
                    name, args[0].detach().reshape(-1, args[0].shape[-1]).float()
                )
            )
            for name, module in self._layer.named_modules() if self._may_read(name, module)
        ]  # fmt: skip
        for constant in self.constants.values():
            constant.seen = None
        try:
            output = self._call.run(self._layer, self.inputs)
        finally:
            for handle in handles + readers:
                handle.remove()
        inputs = {n: c.seen for n, c in self.constants.items() if c.seen is not None}
        return Run(inputs | read, output.float(), norms, _attended[-1] if _attended else None)

    def _may_read(self, name: str, module: nn.Module) -> bool:
        """Modules with a matrix of their own that are no linears: routers."""
        weight = module._parameters.get("weight")
        return name not in self.constants and weight is not None and weight.ndim == 2

    def matrices(self) -> str:
        """The classes of the modules that have a matrix, for messages."""
        found = {type(m).__name__ for n, m in self._layer.named_modules() if self._may_read(n, m)}
        return ", ".join(sorted(found)) or "nothing that has a matrix"

    def name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self._layer.named_modules() if other is module)

    def shape(self, linear: str) -> tuple[int, int]:
        module = self.linears[linear]
        return module.out_features, module.in_features

    @contextmanager
    def scaled(self, name: str, rows: torch.Tensor, d: torch.Tensor) -> Iterator[None]:
        """Within the context, some output channels of a constant are multiplied by d."""
        constant = self.constants[name]
        before = constant.output
        factors = torch.ones(constant.out_features)
        factors[rows] = d
        constant.output = before * factors
        try:
            yield
        finally:
            constant.output = before


def norm_offset(norm: nn.Module) -> float | None:
    """0 if norm(x) = weight * n(x) [+ bias] with n an RMS or layer norm, 1 if (1 + weight) * n(x); else None.

    Found by trying it: Gemma's norms multiply by 1 + weight under the names of others' that do not.
    """
    parameters = {n: p for n, p in norm._parameters.items() if p is not None}
    weight = parameters.get("weight")
    if weight is None or weight.ndim != 1 or not set(parameters) <= {"weight", "bias"}:
        return None
    if any(True for _ in norm.children()):
        return None
    x = torch.linspace(-1.0, 2.0, weight.shape[0])
    scale = torch.linspace(0.5, 3.0, x.numel())
    shift = torch.linspace(2.0, -1.0, x.numel()) if "bias" in parameters else torch.zeros(())
    given = {"weight": scale} | ({"bias": shift} if "bias" in parameters else {})
    try:
        got = torch.func.functional_call(norm, given, (x[None],))[0].float()
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return None
    for centred in (x, x - x.mean()):
        normed = centred / centred.square().mean().sqrt()
        for offset in (0.0, 1.0):
            if torch.allclose(got, (scale + offset) * normed + shift, rtol=1e-2, atol=1e-2):
                return offset
    return None
