"""Mixtures of experts, one linear at a time.

transformers keeps the experts of a layer as stacked tensors (`gate_up_proj` [E, 2I, H], `down_proj` [E, H, I])
and converts the files' names on loading. Files, servers and quantization work on single linears, under the names
that the files have. Here a stacked module is replaced by one with a linear each, after it was seen to give the
same outputs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_NAMES = ("gate_proj", "up_proj", "down_proj")


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer and nothing more: routers derive from nn.Linear too."""
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    tiny = copy.copy(module)
    tiny._parameters = {
        "weight": nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0]]), requires_grad=False),
        "bias": None,
    }
    try:
        got = tiny(torch.tensor([[1.0, 0.5]]))
    except Exception:  # whatever it is, it is not a plain linear
        return False
    return torch.is_tensor(got) and got.tolist() == [[2.0, 2.5]]


@dataclass(frozen=True)
class Stack:
    """How a module keeps its experts, found by trying it.

    Attributes:
        transposed: matrices are [in, out], not [out, in].
        interleaved: rows of gate and up take turns, instead of gate's coming first.
        sorted: called with every token once per expert, weighted before (Llama 4), instead of with
            (tokens, indices of the experts, weights).
    """

    transposed: bool = False
    interleaved: bool = False
    sorted: bool = False

    def matrix(self, stored: torch.Tensor, which: str) -> torch.Tensor:
        """[out, in] of `gate`, `up` or `down` from one expert's stored gate_up or down."""
        whole = stored.T if self.transposed else stored
        if which == "down":
            return whole
        if self.interleaved:
            return whole[0::2] if which == "gate" else whole[1::2]
        half = whole.shape[0] // 2
        return whole[:half] if which == "gate" else whole[half:]

    def stored_rows(self, which: str, rows: tuple[int, int], stored: int) -> slice | None:
        """Where rows [first, last) of a matrix lie among the `stored` rows of its tensor; None where they are columns."""
        first, last = rows
        if self.transposed:
            return None
        if which == "down":
            return slice(first, last, 1)
        if self.interleaved:
            offset = 1 if which == "up" else 0
            return slice(2 * first + offset, 2 * last, 2)
        offset = stored // 2 if which == "up" else 0
        return slice(offset + first, offset + last, 1)


class _Unset(nn.Linear):
    """Without numbers drawn at random, which others replace: for 36,000 linears of a model of 235B they take seconds."""

    def reset_parameters(self) -> None:
        pass


class Expert(nn.Module):
    """A gated MLP whose linears have the file's names.

    Args:
        names: of gate, up and down.
    """

    def __init__(self, hidden: int, inner: int, names: tuple[str, str, str], act_fn: Any) -> None:
        super().__init__()
        self.names = names
        for name, sizes in zip(names, ((hidden, inner), (hidden, inner), (inner, hidden))):
            linear: nn.Linear = _Unset(*sizes, bias=False)
            linear.__class__ = nn.Linear
            setattr(self, name, linear)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self._modules[name] for name in self.names)
        assert gate is not None
        assert up is not None
        assert down is not None
        output: torch.Tensor = down(self.act_fn(gate(x)) * up(x))
        return output


class LinearExperts(nn.Module):
    """Experts with a linear for each matrix; each runs on the tokens that are routed to it.

    Args:
        experts: their number.
        hidden, inner: sizes of their inputs, and between their linears.
        names: of the linears gate, up and down within an expert.
        stack: how the module whose place this takes kept them.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        inner: int,
        names: tuple[str, str, str],
        act_fn: Any,
        stack: Stack,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.names, self.stack = experts, hidden, names, stack
        for number in range(experts):
            self.add_module(str(number), Expert(hidden, inner, names, act_fn))

    def expert(self, number: int) -> Any:
        return self._modules[str(number)]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if top_k_index is None or top_k_weights is None:
            return self._sorted(hidden_states)
        out = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == number)
            given = self.expert(number)(hidden_states[token]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, given.to(out.dtype))
        return out

    def _sorted(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for number, tokens in enumerate(hidden_states.chunk(self.num_experts)):
            # A weight of zero says that the token was not routed here; without biases zeros stay zeros.
            routed = tokens.ne(0).any(-1).nonzero().flatten()
            if routed.numel():
                first = number * tokens.shape[0]
                out[first + routed] = self.expert(number)(tokens[routed]).to(out.dtype)
        return out

    def fill(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Take the weights of a stacked module."""
        gate, up, last = self.names
        for number in range(self.num_experts):
            expert = self.expert(number)
            for name, matrix in (
                (gate, self.stack.matrix(gate_up[number], "gate")),
                (up, self.stack.matrix(gate_up[number], "up")),
                (last, self.stack.matrix(down[number], "down")),
            ):
                getattr(expert, name).weight = nn.Parameter(matrix, requires_grad=False)


def unstack_experts(model: Any) -> None:
    """Replace every stacked module of experts whose outputs linears can reproduce; others stay.

    Works on the meta device as on real weights.
    """
    names: tuple[str, str, str] | None = None
    known: dict[type, Stack | None] = {}
    for path, module in list(model.named_modules()):
        gate_up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
        if gate_up is None or down is None or gate_up.ndim != 3 or len(module._parameters) != 2:
            continue
        if type(module) not in known:
            with torch.device("cpu"):  # transformers loads under the meta device
                known[type(module)] = _find_stack(module)
        stack = known[type(module)]
        if stack is None:
            continue
        names = names or _file_names(model)
        inner, hidden = down.shape[1:] if stack.transposed else down.shape[:0:-1]
        with torch.device("meta"):
            linear = LinearExperts(gate_up.shape[0], hidden, inner, names, module.act_fn, stack)
        if not gate_up.is_meta:
            linear.fill(gate_up.detach(), down.detach())
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        parent, _, child = path.rpartition(".")
        if not module.training:
            linear.eval()
        setattr(model.get_submodule(parent), child, linear)


def _file_names(model: Any) -> tuple[str, str, str]:
    """What files call gate, up and down of an expert: transformers' own table of conversions says."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, list[str]] = {}
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        for target in conversion.target_patterns:
            kind = target.rpartition(".")[2]
            sources = [s.removesuffix("$").split(".") for s in conversion.source_patterns]
            if kind in ("gate_up_proj", "down_proj") and all("*" in s for s in sources):
                found[kind] = [s[-2] for s in sources]
    if [len(found.get(kind, ())) for kind in ("gate_up_proj", "down_proj")] != [2, 1]:
        return _NAMES
    return (*found["gate_up_proj"], *found["down_proj"])  # type: ignore[return-value]


@torch.no_grad()
def _find_stack(module: Any) -> Stack | None:
    """How a stacked module computes, tried on a copy of it with tiny weights; None if as no `Stack` says."""
    experts = module.gate_up_proj.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 4, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:1] for _ in range(5)])
    weights = torch.rand(5, 1, generator=generator)
    for transposed in (False, True):
        inner, hidden = module.down_proj.shape[1:] if transposed else module.down_proj.shape[:0:-1]
        tiny = _shrunk(module, {hidden: 4, inner: 4 if inner == hidden else 6})
        size = 4 if inner == hidden else 6
        gate_up = torch.randn(experts, 4, 2 * size, generator=generator)
        down = torch.randn(experts, size, 4, generator=generator)
        if not transposed:
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
        tiny._parameters["gate_up_proj"] = nn.Parameter(gate_up, requires_grad=False)
        tiny._parameters["down_proj"] = nn.Parameter(down, requires_grad=False)
        for in_order in (False, True):
            given = (tokens.repeat(experts, 1),) if in_order else (tokens, index, weights)
            try:
                want = tiny(*given)
            except Exception:  # it is called otherwise, or its matrices lie otherwise
                continue
            for interleaved in (False, True):
                stack = Stack(transposed, interleaved, in_order)
                linear = LinearExperts(experts, 4, size, _NAMES, module.act_fn, stack)
                linear.fill(gate_up, down)
                if want.shape == given[0].shape and torch.allclose(linear(*given), want, atol=1e-4):
                    return stack
    return None


def _shrunk(module: Any, sizes: dict[int, int]) -> Any:
    """A copy whose numbers that say a size say a smaller one."""
    tiny = copy.copy(module)
    tiny._parameters = dict(module._parameters)
    if hasattr(module, "config"):
        # Grouped products want sizes that tiny weights have not.
        tiny.config = copy.copy(module.config)
        tiny.config._experts_implementation = "eager"
    for name, value in list(vars(module).items()):
        if (type(value) is int and value in sizes and "expert" not in name) or name == "expert_dim":
            setattr(tiny, name, sizes[value])
    return tiny
