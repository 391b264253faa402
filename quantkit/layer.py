"""One decoder layer: statistics -> factors folded -> weights quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.calibration.few_tokens import is_starved, statistics_of
from quantkit.calibration.outliers import input_outliers, outlier_ratio
from quantkit.calibration.simulate import SimulatedLinear
from quantkit.calibration.statistics import InputStatistics, KeyStatistics
from quantkit.formats.scheme import Scheme, WeightFormat
from quantkit.methods import crossquant, fireq, fp8_scales, rounding, smoothing
from quantkit.methods.gptq import gptq
from quantkit.methods.hadamard import rotate
from quantkit.models.folding import fold_factor, fold_rope_factor
from quantkit.models.groups import Attention, InputGroup, LayerStructure
from quantkit.models.rotating import turn_values, value_block
from quantkit.recipe import Recipe, Weights
from quantkit.runtime.activations import round_activation

# CrossQuant's own alpha, section 4 of the paper.
_PAPER_ALPHA = 0.15
_STORE = {
    "bf16": rounding.store_bf16,
    "fp8_channel": fp8_scales.store_fp8_channel,
}


@dataclass
class QuantizedLayer:
    """What came of a decoder layer.

    Attributes:
        weights: linear's name within the layer -> (codes int8 [N, K], stored scale float32 [N, G]).
        post_scale: factor on keys after RoPE, float32 [KV heads, head_dim], or None.
        report: per linear and per layer figures, plain data.
    """

    weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
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
        result.post_scale = _scale_keys(layer, recipe, structure.attention, keys, result)
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
            _quantize_linear(layer, name, recipe, weights, scheme, hessian, result)
            result.report["linears"][name] |= figures
    return result


def _scale_keys(
    layer: nn.Module,
    recipe: Recipe,
    attention: Attention,
    keys: KeyStatistics,
    result: QuantizedLayer,
) -> torch.Tensor | None:
    """FireQ's two factors on keys: folds the one before RoPE, returns the one after it."""
    assert recipe.rope_scaling
    assert keys.absmax is not None
    assert keys.pairs is not None
    scaling = recipe.rope_scaling
    post, taken = None, torch.zeros_like(keys.absmax, dtype=torch.bool)
    after = keys.absmax
    if scaling.beta is not None and scaling.top_k:
        post, taken = fireq.rope_post_factor(keys.absmax, scaling.beta, scaling.top_k)
    if scaling.alpha is not None:
        pre = fireq.rope_pre_factor(keys.pairs, scaling.alpha)
        applied = fold_rope_factor(layer, torch.where(taken, torch.ones_like(pre), pre), attention)
        if post is not None:
            # A pre factor shared by all heads can reach channels that a head's post factor takes.
            post = torch.where(taken, post / applied, post)
        after = after * applied
    result.report["outliers"]["keys"] = {
        "before": outlier_ratio(keys.absmax),
        "after": outlier_ratio(after if post is None else after * post),
    }
    return post


def choose_factor(
    layer: nn.Module,
    group: InputGroup,
    recipe: Recipe,
    prefix: str,
    scheme: Scheme,
    stats: InputStatistics,
    rotation: int | None = None,
) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """The channel factor of one input group: the exponent with the least joint error of input and weights.

    Args:
        rotation: the block by which the input is rotated before it is rounded, online or in the weights.

    Returns:
        (d [K], or None for the identity; figures for the report).
    """
    assert recipe.channel_scaling
    method, exponents = recipe.channel_scaling.method, recipe.channel_scaling.exponents
    weights: list[Any] = [layer.get_submodule(name).weight for name in group.linears]
    candidates = [_factor(method, exponent, stats, weights) for exponent in exponents]
    if group.feeder is not None:
        candidates = [group.feeder.shared(d) for d in candidates]
    if len(candidates) == 1:
        return candidates[0], {"method": method, "exponent": exponents[0]}
    best, errors = smoothing.search(
        candidates,
        stats.rows,
        weights,
        partial(_round_input, scheme=scheme, rotation=rotation),
        partial(
            _round_weight,
            weights=recipe.weights_of(prefix + group.linears[0]),
            scheme=scheme,
            rotation=rotation,
        ),
    )
    chosen = next(
        (e for e, d in zip(exponents, candidates) if d is best or torch.equal(d, best)), None
    )
    return best, {"method": method, "exponent": chosen, "errors": [float(e) for e in errors]}


def zero_fractions(
    stats: InputStatistics, factor: torch.Tensor | None, scheme: Scheme | None
) -> dict[str, float] | None:
    """Shares of an input's nonzero values that INT rounding loses: per token, folded, and in the paper's form.

    Source: CrossQuant (arXiv 2410.07505), its "quantization kernel"; alpha is the paper's in the last.
    """
    acts = scheme.activations if scheme else None
    if acts is None or acts.type != "int" or acts.half:
        return None
    rows = stats.rows
    folded = rows if factor is None else rows / factor
    return {
        "per_token": crossquant.zero_fraction(rows, crossquant.per_token_scale(rows, acts.bits)),
        "folded": crossquant.zero_fraction(folded, crossquant.per_token_scale(folded, acts.bits)),
        "dynamic": crossquant.zero_fraction(
            rows, crossquant.dynamic_scale(rows, acts.bits, _PAPER_ALPHA)
        ),
    }


def _factor(
    method: str, exponent: float, stats: InputStatistics, weights: list[torch.Tensor]
) -> torch.Tensor:
    stacked = torch.cat([w.detach() for w in weights])
    if method == "awq":
        d = smoothing.awq_factor(stats.mean_abs, exponent)
    elif method == "crossquant":
        d = crossquant.fold_factor(stats.absmax, exponent)
    elif method == "smoothquant":
        d = smoothing.smoothquant_factor(stats.absmax, stacked.abs().amax(0), exponent)
    elif method == "balance":
        d = smoothing.balance_factor(stats.rms, stacked.square().mean(0).sqrt(), exponent)
    else:
        d = fireq.constant_factor(stacked.abs().amax(0), exponent)
    return smoothing.normalise(d)


def _round_input(x: torch.Tensor, scheme: Scheme, rotation: int | None) -> torch.Tensor:
    """Rotated back after rounding, so that the product stands in the original basis."""
    if not rotation:
        return round_activation(x, scheme.activations)
    return rotate(round_activation(rotate(x, rotation), scheme.activations), rotation, inverse=True)


def _round_weight(
    w: torch.Tensor, weights: Weights, scheme: Scheme, rotation: int | None
) -> torch.Tensor:
    if rotation:
        w = rotate(w, rotation)
    grid = rounding.Grid(scheme.weights.bits, scheme.weights.half)
    # A clip search per candidate costs much and moves all candidates alike.
    clip = "gaussian" if weights.clip == "gaussian" else "absmax"
    scale = weight_scale(w, scheme.weights, clip, None)
    w = rounding.dequantize(rounding.quantize(w, scale, grid), scale, grid)
    return rotate(w, rotation, inverse=True) if rotation else w


def weight_scale(
    weight: torch.Tensor, form: WeightFormat, clip: str, importance: torch.Tensor | None
) -> torch.Tensor:
    """Scales float32 [N, G] of a weight [N, K], as they will be stored."""
    grid = rounding.Grid(form.bits, form.half)
    if clip == "gaussian":
        scale = rounding.gaussian_scale(weight, form.group_size, grid)
    elif clip == "mse":
        scale = rounding.mse_scale(weight, form.group_size, grid, importance)
    else:
        scale = rounding.absmax_scale(weight, form.group_size, grid)
    return (
        fp8_scales.store_fp8_tensor(scale, weight)
        if form.scale == "fp8_tensor"
        else _STORE[form.scale](scale)
    )


def _quantize_linear(
    layer: nn.Module,
    name: str,
    recipe: Recipe,
    weights: Weights,
    scheme: Scheme,
    hessian: torch.Tensor | None,
    result: QuantizedLayer,
) -> None:
    linear: Any = layer.get_submodule(name)
    weight = linear.weight.detach()
    if scheme.rotation:
        weight = rotate(weight, scheme.rotation)
    grid = rounding.Grid(scheme.weights.bits, scheme.weights.half)
    importance = hessian.diagonal() if hessian is not None else None
    scale = weight_scale(weight, scheme.weights, weights.clip, importance)
    rows, columns = weight.shape
    figures: dict[str, Any] = {
        "scheme": str(scheme),
        "rounding": weights.rounding,
        "weights": rows * columns,
        "bits": scheme.packed_bytes(rows, columns) * 8 / (rows * columns),
    }
    if weights.rounding == "gptq":
        assert hessian is not None
        solved = gptq(
            weight,
            hessian,
            scale,
            grid,
            damping=recipe.gptq.damping,
            block=recipe.gptq.block,
            act_order=recipe.gptq.activation_order,
        )
        codes = solved.codes
        figures |= {"damping": solved.damping, "fell_back": solved.fell_back}
    else:
        codes = rounding.quantize(weight, scale, grid)
    values = rounding.dequantize(codes, scale, grid)
    figures["weight_error"] = _relative(values - weight, weight, None)
    if hessian is not None:
        figures["output_error"] = _relative(values - weight, weight, hessian)
    result.report["linears"][name] = figures
    result.weights[name] = (codes, scale)
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, SimulatedLinear(values, linear.bias, scheme))


def _relative(error: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """Squared error over squared weight, both seen through the inputs if a Hessian is given."""
    if hessian is None:
        return float(error.square().sum() / weight.square().sum().clamp_min(1e-30))
    return float(
        ((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum().clamp_min(1e-30)
    )
