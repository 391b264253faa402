"""One weight: scales as they are stored, and codes against them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from quantkit.device import product_dtype
from quantkit.formats.scheme import Scheme, WeightFormat
from quantkit.methods import fp8_scales, rounding
from quantkit.methods.gptq import HessianFactor, factorize, gptq
from quantkit.methods.hadamard import rotate
from quantkit.methods.scale_fit import FP8_STRETCHES, fit_scales
from quantkit.recipe import GPTQ, Weights

# Columns of a Hessian that are multiplied together.
_STRIP = 1024
_ENERGY_OUTPUTS = 512
# Rows of a weight whose errors are looked at together.
_ROWS = 512


@dataclass(frozen=True)
class Solved:
    """A quantized weight.

    Attributes:
        codes: int8 [N, K], of the rotated weight where the scheme rotates.
        scale: as stored, float32 [N, G].
        target: float32 [N, K]: `codes` are its nearest levels; None where nobody asks for it.
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


class Inputs:
    """What linears that read one input are quantized for.

    Attributes:
        hessian: of the input as the weights will read it (factors folded, rotated), float32 [K, K].
    """

    def __init__(self, hessian: torch.Tensor, settings: GPTQ) -> None:
        self.hessian = hessian
        self._settings = settings

    @cached_property
    def factor(self) -> HessianFactor | None:
        """For GPTQ, made when the first linear asks; None where the Hessian cannot be used."""
        return factorize(
            self.hessian,
            damping=self._settings.damping,
            act_order=self._settings.activation_order,
        )

    def energy(self, weight: torch.Tensor, bits: int) -> float:
        """tr(W H W^T) of a weight [N, K] of so many bits: what its errors are compared with.

        Some hundred outputs, evenly spread, stand for all: it is a figure of the report, and costs as much as a solve.
        """
        dtype = product_dtype(weight.device, bits)
        rows = weight.shape[0]
        weight = weight[:: max(1, rows // _ENERGY_OUTPUTS)]
        narrow, total = weight.to(dtype), 0.0
        for first in range(0, weight.shape[1], _STRIP):
            strip = slice(first, first + _STRIP)
            hessian = self.hessian[: strip.stop, strip].to(dtype)
            # H is symmetric: what lies left of the diagonal counts twice.
            product = narrow[:, strip] @ hessian[first:]
            product += 2 * (narrow[:, :first] @ hessian[:first])
            total += float(product.float().mul_(weight[:, strip]).sum())
        return total * rows / max(weight.shape[0], 1)


def solve(
    weight: torch.Tensor,
    scheme: Scheme,
    weights: Weights,
    settings: GPTQ,
    inputs: Inputs | None,
    *,
    keep_target: bool = False,
) -> tuple[Solved, dict[str, Any]]:
    """A weight [N, K] in its scheme, and figures for the report.

    Args:
        inputs: what it reads; needed for GPTQ.
        keep_target: whether the result has one.
    """
    if scheme.rotation:
        weight = rotate(weight, scheme.rotation)
    grid = rounding.Grid(scheme.weights.bits, scheme.weights.half)
    importance = inputs.hessian.diagonal() if inputs else None
    scale = weight_scale(weight, scheme.weights, weights.clip, importance)
    rows, columns = weight.shape
    figures: dict[str, Any] = {
        "scheme": str(scheme),
        "rounding": weights.rounding,
    } | size_figures(scheme, rows, columns)
    found = None
    if weights.rounding == "gptq":
        assert inputs
        factor = inputs.factor
        figures |= {"damping": factor.damping if factor else None, "fell_back": factor is None}
        if factor:
            found = gptq(weight, factor, scale, grid, block=settings.block)
            if settings.fit_scales:
                fitted = _fitted(weight, found.codes, scale, inputs.hessian, scheme.weights)
                again = gptq(weight, factor, fitted, grid, block=settings.block)
                # GPTQ is no descent: what it chooses for better scales may be worse.
                if again.loss < found.loss:
                    found, scale = again, fitted
    codes = found.codes if found else rounding.quantize(weight, scale, grid)
    error, loss = _errors(
        weight, codes, scale, grid, None if found or not inputs else inputs.hessian
    )
    figures["weight_error"] = error
    if inputs is not None:
        energy = inputs.energy(weight, scheme.weights.bits)
        figures["output_error"] = (found.loss if found else loss) / max(energy, 1e-30)
    target = (found.target if found else weight) if keep_target else None
    return Solved(codes, scale, target), figures


def _errors(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    grid: rounding.Grid,
    hessian: torch.Tensor | None,
) -> tuple[float, float]:
    """The squared error E of the codes over the weight's square, and tr(E H E^T) where a Hessian is given; by rows."""
    missed = total = loss = 0.0
    for first in range(0, weight.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        error = rounding.dequantize(codes[rows], scale[rows], grid) - weight[rows]
        if hessian is not None:
            loss += float(((error @ hessian) * error).sum())
        missed += float(error.square_().sum())
        total += float(weight[rows].square().sum())
    return missed / max(total, 1e-30), loss


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
