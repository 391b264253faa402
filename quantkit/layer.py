"""One decoder layer: statistics -> factors folded -> weights quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantkit.calibration.few_tokens import is_starved, statistics_of
from quantkit.calibration.outliers import input_outliers
from quantkit.calibration.simulate import SimulatedLinear
from quantkit.calibration.statistics import InputStatistics, KeyStatistics
from quantkit.factors import choose_factor, zero_fractions
from quantkit.formats.scheme import Scheme
from quantkit.keys import scale_keys
from quantkit.methods.rounding import Grid, dequantize
from quantkit.models.folding import fold_factor
from quantkit.models.groups import LayerStructure
from quantkit.models.rotating import turn_values, value_block
from quantkit.recipe import Recipe
from quantkit.solve import Solved, solve


@dataclass
class QuantizedLayer:
    """What came of a decoder layer.

    Attributes:
        weights: linear's name within the layer -> its codes and scales.
        post_scale: factor on keys after RoPE, float32 [KV heads, head_dim], or None.
        report: per linear and per layer figures, plain data.
    """

    weights: dict[str, Solved] = field(default_factory=dict)
    post_scale: torch.Tensor | None = None
    report: dict[str, Any] = field(default_factory=dict)


def quantize_layer(
    layer: nn.Module,
    prefix: str,
    recipe: Recipe,
    schemes: dict[str, Scheme],
    structure: LayerStructure,
    inputs: dict[str, InputStatistics],
    keys: KeyStatistics | None,
    norm_dtype: torch.dtype,
) -> QuantizedLayer:
    """Transform a layer in place, quantize its linears and put simulations in their place.

    Args:
        layer: weights in float32.
        prefix: the layer's full name with a dot at its end.
        structure: the layer's.
        inputs: statistics per input group; empty when the recipe needs no calibration.
        keys: statistics of the keys, or None.
        norm_dtype: the type norms are stored in.
    """
    result = QuantizedLayer(
        report={"linears": {}, "factors": {}, "zero_fraction": {}, "outliers": {}}
    )
    factors: dict[str, torch.Tensor] = {}
    turned = value_block(structure) if recipe.rotation and recipe.rotation.values else None
    if keys is not None and recipe.rope_scaling and not structure.attention.why_no_factors:
        result.post_scale, result.report["keys"], result.report["outliers"]["keys"] = scale_keys(
            layer, recipe, structure.attention, keys
        )
    for group in structure.groups:
        scheme = schemes.get(prefix + group.linears[0])
        if (
            scheme is None
            or not recipe.channel_scaling
            or group.place not in recipe.channel_scaling.places
            or group.feeder is None
            or is_starved(group, inputs)
        ):
            continue
        rotation = turned if turned and group.place == "o" else scheme.rotation
        factor, figures = choose_factor(
            layer, group, recipe, prefix, scheme, inputs[group.name], rotation
        )
        if factor is not None:
            factors[group.name] = fold_factor(layer, group, factor, norm_dtype)
        result.report["factors"][group.name] = figures
    if turned:
        turn_values(layer, structure, turned)
    for group in structure.groups:
        if group.name in inputs and inputs[group.name].tokens:
            stats, factor = inputs[group.name], factors.get(group.name)
            scheme = schemes.get(prefix + group.linears[0])
            shares = zero_fractions(stats, factor, scheme)
            result.report["zero_fraction"] |= {group.name: shares} if shares else {}
            online = scheme.rotation if scheme else None
            rotation = turned if turned and group.place == "o" else online
            result.report["outliers"][group.name] = input_outliers(stats, factor, rotation)
        for name in group.linears:
            scheme = schemes.get(prefix + name)
            if scheme is None:
                continue
            seen, figures = statistics_of(group, name, inputs)
            rotation = turned if turned and group.place == "o" else scheme.rotation
            hessian = seen.hessian_after(factors.get(group.name), rotation) if seen else None
            weights = recipe.weights_of(prefix + name)
            if figures.get("fallback") == "nearest":
                weights = weights.model_copy(update={"rounding": "nearest"})
            linear: Any = layer.get_submodule(name)
            weight = linear.weight.detach()
            solved, measured = solve(weight, scheme, weights, recipe.gptq, hessian)
            result.report["linears"][name] = measured | figures
            result.weights[name] = solved
            simulate(layer, name, solved, scheme)
    return result


def simulate(layer: nn.Module, name: str, solved: Solved, scheme: Scheme) -> None:
    """Put a simulation of a quantized linear in its place."""
    grid = Grid(scheme.weights.bits, scheme.weights.half)
    parent, _, child = name.rpartition(".")
    values = dequantize(solved.codes, solved.scale, grid)
    bias: Any = layer.get_submodule(name).bias
    setattr(layer.get_submodule(parent), child, SimulatedLinear(values, bias, scheme))
