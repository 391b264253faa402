"""Channel factors that move difficulty between an activation and the weight behind it.

One convention: a factor d [K] divides the activation and multiplies the weight's columns, so that
(x / d) (W d)^T = x W^T. Every factor here is normalised: geometric mean 1, dead channels 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LIMIT = 1e4


def normalise(factor: Tensor) -> Tensor:
    """`factor` [K] over its geometric mean, float32, within [1e-4, 1e4].

    Entries that are not positive and finite belong to dead channels: they become 1 and do not count.
    """
    factor = factor.double()
    alive = torch.isfinite(factor) & (factor > 0)
    if not bool(alive.any()):
        return torch.ones_like(factor, dtype=torch.float32)
    logs = torch.where(alive, factor, 1.0).log()
    scaled = (logs - logs[alive].mean()).exp().clamp(1 / _LIMIT, _LIMIT)
    return torch.where(alive, scaled, 1.0).float()


def awq_factor(mean_abs: Tensor, exponent: float) -> Tensor:
    """mean|x|^exponent [K]. Source: AWQ, arXiv 2306.00978, equation 5 (its s)."""
    return normalise(_power(mean_abs, exponent))


def smoothquant_factor(act_absmax: Tensor, weight_absmax: Tensor, exponent: float) -> Tensor:
    """max|x|^exponent / max|w|^(1-exponent) [K]. Source: SmoothQuant, arXiv 2211.10438, equation 4."""
    return normalise(_power(act_absmax, exponent) / _power(weight_absmax, 1 - exponent))


def balance_factor(act_rms: Tensor, weight_rms: Tensor, exponent: float = 0.5) -> Tensor:
    """(rms(x) / rms(w))^exponent [K]: 0 changes nothing, 1/2 makes both sides alike.

    A rotation spreads a channel's size, on each side; it cannot undo one that is huge in the activation and
    tiny in the weight. So this comes before the rotation.
    """
    return normalise(_power(act_rms.double() / weight_rms.double(), exponent))


@torch.no_grad()
def search(
    candidates: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    quantize_activation: Callable[[Tensor], Tensor] | None,
    quantize_weight: Callable[[Tensor], Tensor],
    products: torch.dtype = torch.float32,
) -> tuple[Tensor, list[float]]:
    """The factor with the least output error.

    The error is ||x W^T - Qa(x / d) Qw(W d)^T||^2, summed over the linears that share the input; where only weights
    are quantized, ||x (W - Qw(W d) / d)^T||^2. The identity is always tried, first; the earlier one wins a tie, and
    an error that is NaN never wins.

    Args:
        candidates: factors d [K].
        x: calibration rows [T, K].
        weights: the linears' weights, each [N, K].
        quantize_activation: fake quantizer of rows [T, K]; None leaves them.
        quantize_weight: fake quantizer of a weight [N, K].
        products: the type in which matrices are multiplied.

    Returns:
        The best d, float32 [K], and the errors: the identity's first, then each candidate's.

    Raises:
        ValueError: a candidate is not [K], or there are no weights.
    """
    columns = x.shape[-1]
    for d in candidates:
        if d.shape != (columns,):
            raise ValueError(f"a factor for {columns} inputs cannot have shape {list(d.shape)}")
    if not weights:
        raise ValueError("a search needs at least one weight")
    x = x.float()

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return (rows.to(products) @ weight.to(products).T).float()

    factors = [torch.ones(columns, device=x.device), *(d.float() for d in candidates)]
    rounded = [quantize_activation(x / d) for d in factors] if quantize_activation else []
    errors = [0.0] * len(factors)
    # A linear at a time: of a layer's experts, the outputs would be many times the inputs.
    for weight in map(Tensor.float, weights):
        output = product(x, weight) if rounded else None
        for number, d in enumerate(factors):
            stored = quantize_weight(weight * d)
            if output is None:
                missed = product(x, weight - stored / d)
            else:
                missed = output - product(rounded[number], stored)
            errors[number] += float(missed.square().sum())
    errors = [error if math.isfinite(error) else math.inf for error in errors]
    return factors[errors.index(min(errors))], errors


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent in float64; zeros stay zero (dead) also where the exponent is 0."""
    x = x.double()
    return torch.where(x > 0, x.pow(exponent), 0.0)
