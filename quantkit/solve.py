"""One weight: scales as they are stored, and codes against them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from quantkit.formats.scheme import Scheme, WeightFormat
from quantkit.methods import fp8_scales, rounding
from quantkit.methods.gptq import gptq
from quantkit.methods.hadamard import rotate
from quantkit.methods.scale_fit import FP8_STRETCHES, fit_scales
from quantkit.recipe import GPTQ, Weights


@dataclass(frozen=True)
class Solved:
    """A quantized weight.

    Attributes:
        codes: int8 [N, K], of the rotated weight where the scheme rotates.
        scale: as stored, float32 [N, G].
        target: float32 [N, K]: `codes` are its nearest levels; None where nobody asks any more.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    target: torch.Tensor | None = None


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
    return store_scale(scale, weight, form)


def store_scale(scale: torch.Tensor, weight: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Scales [N, G] of a weight [N, K], rounded to what the format stores; float32."""
    if form.scale == "fp8_tensor":
        return fp8_scales.store_fp8_tensor(scale, weight, rounding.Grid(form.bits, form.half))
    if form.scale == "fp8_channel":
        return fp8_scales.store_fp8_channel(scale)
    return rounding.store_bf16(scale)


def size_figures(scheme: Scheme, rows: int, columns: int) -> dict[str, float]:
    """For the report: how many weights a linear has, and the bits of each with its share of the scales."""
    count = rows * columns
    return {"weights": count, "bits": scheme.packed_bytes(rows, columns) * 8 / count}


def solve(
    weight: torch.Tensor,
    scheme: Scheme,
    weights: Weights,
    settings: GPTQ,
    hessian: torch.Tensor | None,
) -> tuple[Solved, dict[str, Any]]:
    """A weight [N, K] in its scheme, and figures for the report.

    Args:
        hessian: of the linear's input as the weight will read it (factors folded, rotated), or None.
    """
    if scheme.rotation:
        weight = rotate(weight, scheme.rotation)
    grid = rounding.Grid(scheme.weights.bits, scheme.weights.half)
    importance = hessian.diagonal() if hessian is not None else None
    scale = weight_scale(weight, scheme.weights, weights.clip, importance)
    rows, columns = weight.shape
    figures: dict[str, Any] = {
        "scheme": str(scheme),
        "rounding": weights.rounding,
    } | size_figures(scheme, rows, columns)
    if weights.rounding == "gptq":
        assert hessian is not None
        choose_codes = partial(
            gptq,
            weight,
            hessian,
            grid=grid,
            damping=settings.damping,
            block=settings.block,
            act_order=settings.activation_order,
        )
        found = choose_codes(scale)
        if settings.fit_scales and not found.fell_back:
            fitted = _fitted(weight, found.codes, scale, hessian, scheme.weights)
            again = choose_codes(fitted)
            # GPTQ is no descent: what it chooses for better scales may be worse.
            before, after = (
                _relative(rounding.dequantize(r.codes, s, grid) - weight, weight, hessian)
                for r, s in ((found, scale), (again, fitted))
            )
            if after < before:
                found, scale = again, fitted
        codes, target = found.codes, found.target
        figures |= {"damping": found.damping, "fell_back": found.fell_back}
    else:
        codes, target = rounding.quantize(weight, scale, grid), weight
    error = rounding.dequantize(codes, scale, grid) - weight
    figures["weight_error"] = _relative(error, weight, None)
    if hessian is not None:
        figures["output_error"] = _relative(error, weight, hessian)
    return Solved(codes, scale, target), figures


def _fitted(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    hessian: torch.Tensor,
    form: WeightFormat,
) -> torch.Tensor:
    """Scales [N, G], as stored, with the least output error for the codes that GPTQ chose."""
    # fp8_tensor has one power of two for all rows; a row alone is stored as fp8_channel stores it.
    per_row = replace(form, scale="fp8_channel") if form.scale == "fp8_tensor" else form
    return fit_scales(
        weight,
        codes,
        scale,
        hessian,
        rounding.Grid(form.bits, form.half),
        lambda rows: store_scale(rows, rows, per_row),
        stretches=FP8_STRETCHES if form.scale.startswith("fp8") else (1.0,),
    )


def _relative(error: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """Squared error over squared weight, both seen through the inputs if a Hessian is given."""
    if hessian is None:
        return float(error.square().sum() / weight.square().sum().clamp_min(1e-30))
    return float(
        ((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum().clamp_min(1e-30)
    )
