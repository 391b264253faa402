"""Rounding of activations by their format, through the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.formats.scheme import ActivationFormat
from quantkit.kernels.quantize_fp8 import quantize_fp8
from quantkit.kernels.quantize_half import quantize_half
from quantkit.kernels.quantize_int8 import quantize_int8


@dataclass(frozen=True, eq=False)
class Quantized:
    """An activation's codes [..., K] (int8 or e4m3) and scales float32 [..., 1]."""

    codes: torch.Tensor
    scale: torch.Tensor


def form_name(form: ActivationFormat) -> str:
    """The format as the fused kernels name it: `fp8`, `int8` or `half`."""
    return "fp8" if form.type == "float" else "half" if form.half else "int8"


def quantize_activation(
    x: torch.Tensor, form: ActivationFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (codes [..., K] in int8 or e4m3, scale float32 [..., 1])."""
    if form.type == "float":
        return quantize_fp8(x)
    return quantize_half(x, form.bits) if form.half else quantize_int8(x, form.bits)


def round_activation(x: torch.Tensor, form: ActivationFormat | None) -> torch.Tensor:
    """x as the kernels see it: quantized and back, in x's type. None leaves it."""
    if form is None:
        return x
    codes, scale = quantize_activation(x, form)
    offset = 0.5 if form.half else 0.0
    return ((codes.float() + offset) * scale).to(x.dtype)
