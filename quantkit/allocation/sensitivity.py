"""What each width costs each part of a model: the error that it puts into the residual stream.

A part is a place of a decoder layer: the linears that read one input, which servers fuse (of experts, all three). With its weights rounded
to b bits and everything else as it was, the layer's output h differs from the original's by d: the cost is the mean
over tokens of |d|^2 / |h|^2. Errors of different parts are small and nearly independent, so costs add up, and each is
measured relative to the stream, which is what the norms of all later layers see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.calibration.stream import LayerStream
from quantkit.formats.scheme import Scheme
from quantkit.methods import rounding
from quantkit.methods.hadamard import rotate
from quantkit.models.groups import Place
from quantkit.models.rotating import turn_values, value_block
from quantkit.plan import Plan
from quantkit.ranks import ALONE, Found, Ranks
from quantkit.recipe import Weights
from quantkit.solve import weight_scale


@dataclass(frozen=True)
class Part:
    """Linears that get one width.

    Attributes:
        name: `layer.place`, as `3.gate_up`, or `3.gate_up+down`.
        linears: their full names.
        weights: how many numbers they hold.
        sizes: bits -> bytes on disk, scales and shapes included.
        costs: bits -> error of the residual stream, as this module's docstring says.
    """

    name: str
    linears: tuple[str, ...]
    weights: int
    sizes: dict[int, int]
    costs: dict[int, float]


def parts_of(plan: Plan, widths: list[int]) -> list[Part]:
    """The parts of a model with their sizes, in order; costs are empty yet."""
    shapes, places = plan.structure.shapes(), plan.structure.places()
    parts = []
    for number in range(plan.structure.num_layers):
        prefix = plan.structure.prefix(number)
        inside = [n for n in plan.schemes if n.startswith(prefix)]
        fused = [[prefix + n for n in names] for names in plan.structure.layer(number).fused]
        for joined in _join(list(dict.fromkeys(places[n] for n in inside)), fused, places):
            names = tuple(n for n in inside if places[n] in joined)
            sizes = {
                bits: sum(_with(plan.schemes[n], bits).packed_bytes(*shapes[n]) for n in names)
                for bits in widths
            }
            weights = sum(shapes[n][0] * shapes[n][1] for n in names)
            parts.append(Part(f"{number}.{'+'.join(joined)}", names, weights, sizes, {}))
    return parts


def _join(
    places: list[Place], fused: list[list[str]], place_of: dict[str, Place]
) -> list[list[Place]]:
    """Places together that servers fuse linears of: all of an expert's need one scheme."""
    joined = [[place] for place in places]
    for names in fused:
        touched = {place_of[name] for name in names}
        together = [group for group in joined if touched & set(group)]
        if len(together) > 1:
            joined = [g for g in joined if g not in together]
            joined.append([place for group in together for place in group])
    return joined


def measure(
    plan: Plan,
    tokens: torch.Tensor,
    widths: list[int],
    device: torch.device,
    tell: Callable[[int, int, str], None],
    ranks: Ranks = ALONE,
) -> list[Part]:
    """The parts of a model with what each width costs, on `tokens` int64 [samples, seqlen]; one layer in memory.

    Several processes share a layer's parts out.
    """
    parts = parts_of(plan, widths)
    stream = LayerStream(
        plan.checkpoint, plan.skeleton, plan.structure, tokens, device, basis=plan.basis
    )
    total = plan.structure.num_layers
    for number in range(total):
        tell(number, total, f"sensitivity of layer {number}")
        prefix = plan.structure.prefix(number)
        with stream.layer(number) as layer:
            if plan.recipe.rotation and plan.recipe.rotation.values:
                structure = plan.structure.layer(number)
                turn_values(layer, structure, value_block(structure))
            want = _outputs(stream, layer, number)
            costs = partial(_costs, plan, stream, layer, number, want, widths)
            here = {n: part for n, part in enumerate(parts) if part.linears[0].startswith(prefix)}
            sizes = [part.weights for part in here.values()]
            for (n, part), (_, found) in ranks.share_out([*here.items()], sizes, costs):
                parts[n] = replace(part, costs=dict(zip(widths, found)))
        assert stream.hidden is not None
        stream.hidden.copy_(want)
    return parts


def _costs(
    plan: Plan,
    stream: LayerStream,
    layer: nn.Module,
    number: int,
    want: torch.Tensor,
    widths: list[int],
    numbered: tuple[int, Part],
) -> Found:
    return (), [_cost(plan, stream, layer, number, numbered[1], bits, want) for bits in widths]


def _cost(
    plan: Plan,
    stream: LayerStream,
    layer: nn.Module,
    number: int,
    part: Part,
    bits: int,
    want: torch.Tensor,
) -> float:
    prefix = plan.structure.prefix(number)
    before = {}
    for name in part.linears:
        linear: Any = layer.get_submodule(name.removeprefix(prefix))
        before[name] = linear.weight
        weights = plan.recipe.weights_of(name)
        assert weights
        rounded = _rounded(linear.weight.detach(), weights, _with(plan.schemes[name], bits))
        linear.weight = nn.Parameter(rounded, requires_grad=False)
    got = _outputs(stream, layer, number)
    for name, weight in before.items():
        linear = layer.get_submodule(name.removeprefix(prefix))
        linear.weight = weight
    error = (got - want).square().sum(-1) / want.square().sum(-1).clamp_min(1e-30)
    return float(error.mean(dtype=torch.float64))


def _outputs(stream: LayerStream, layer: nn.Module, number: int) -> torch.Tensor:
    found: list[torch.Tensor] = []
    stream.run(layer, number, lambda _, output: found.append(output.cpu()))
    return torch.cat(found)


def _rounded(weight: torch.Tensor, weights: Weights, scheme: Scheme) -> torch.Tensor:
    """A weight as it would be stored, rounded to nearest, in the basis that it came in."""
    if scheme.rotation:
        weight = rotate(weight, scheme.rotation)
    grid = rounding.Grid(scheme.weights.bits, scheme.weights.half)
    scale = weight_scale(weight, scheme.weights, weights.clip, None)
    values = rounding.dequantize(rounding.quantize(weight, scale, grid), scale, grid)
    return rotate(values, scheme.rotation, inverse=True) if scheme.rotation else values


def _with(scheme: Scheme, bits: int) -> Scheme:
    return replace(scheme, weights=replace(scheme.weights, bits=bits))
