"""The channel factor of each input of a decoder layer: which one is taken, and what it does to the input."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.calibration.statistics import InputStatistics
from quantkit.device import product_dtype
from quantkit.formats.scheme import Scheme
from quantkit.methods import crossquant, fireq, rounding, smoothing
from quantkit.methods.hadamard import rotate
from quantkit.models.groups import InputGroup
from quantkit.recipe import Recipe, Weights
from quantkit.runtime.activations import quantize_activation, round_activation
from quantkit.solve import weight_scale

# Outputs of each linear, about, on which factors of its inputs are compared: 256 find as good ones in the bundled model.
_SEARCH_OUTPUTS = 1024
# CrossQuant's own alpha, section 4 of the paper.
_PAPER_ALPHA = 0.15


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
    weights_recipe = recipe.weights_of(prefix + group.linears[0])
    assert weights_recipe
    best, errors = smoothing.search(
        candidates,
        stats.rows,
        [_some_rows(weight) for weight in weights],
        partial(_round_input, scheme=scheme, rotation=rotation) if scheme.activations else None,
        partial(
            _round_weight,
            weights=weights_recipe,
            scheme=scheme,
            rotation=rotation,
        ),
        product_dtype(stats.absmax.device, scheme.weights.bits),
    )
    chosen = next(
        (e for e, d in zip(exponents, candidates) if d is best or torch.equal(d, best)), None
    )
    return best, {"method": method, "exponent": chosen, "errors": [float(e) for e in errors]}


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    """Outputs of a linear, evenly spread: a factor of its inputs is chosen as well on a thousand as on all of them."""
    return weight[:: max(1, weight.shape[0] // _SEARCH_OUTPUTS)]


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
        "per_token": crossquant.zero_fraction(rows, quantize_activation(rows, acts)[1]),
        "folded": crossquant.zero_fraction(folded, quantize_activation(folded, acts)[1]),
        "dynamic": crossquant.zero_fraction(
            rows, crossquant.dynamic_scale(rows, acts.bits, _PAPER_ALPHA)
        ),
    }


def _factor(
    method: str, exponent: float, stats: InputStatistics, weights: list[torch.Tensor]
) -> torch.Tensor:
    # One after the other: the experts of a layer together are as large as it is.
    if method == "awq":
        d = smoothing.awq_factor(stats.mean_abs, exponent)
    elif method == "crossquant":
        d = crossquant.fold_factor(stats.absmax, exponent)
    elif method == "balance":
        squares = torch.stack([w.detach().square().sum(0) for w in weights]).sum(0)
        rms = (squares / sum(w.shape[0] for w in weights)).sqrt()
        d = smoothing.balance_factor(stats.rms, rms, exponent)
    else:
        absmax = torch.stack([w.detach().abs().amax(0) for w in weights]).amax(0)
        if method == "smoothquant":
            d = smoothing.smoothquant_factor(stats.absmax, absmax, exponent)
        else:
            d = fireq.constant_factor(absmax, exponent)
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
