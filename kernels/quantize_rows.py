"""The three quantizers of activations under one name, for the ops that quantize what they compute."""

from __future__ import annotations

import torch

from .cpu import rows
from .quantize_fp8 import E4M3, E4M3_MAX, quantize_fp8
from .quantize_half import quantize_half, step_factor
from .quantize_int8 import largest_over_step, quantize_int8

FORMS = ("fp8", "int8", "half")


def quantize_rows(x: torch.Tensor, form: str, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (codes [..., K], float32 scale [..., 1]).

    `fp8` is `quantize_fp8`, `int8` is `quantize_int8` with `bits` of 4 or 8 (int8 codes in both
    cases), `half` is `quantize_half` with `bits` of 1 to 8.
    """
    if form == "fp8":
        return quantize_fp8(x)
    return quantize_half(x, bits) if form == "half" else quantize_int8(x, bits)


def levels_and_factor(form: str, bits: int) -> tuple[float, float]:
    """(largest code, largest / step or, of half-integers, step / rms) as the kernels take them."""
    if form == "fp8":
        return E4M3_MAX, E4M3_MAX
    if form == "half":
        return 2 ** (bits - 1), step_factor(bits)
    return 2 ** (bits - 1) - 1, largest_over_step(bits)


def native_form(form: str, bits: int) -> tuple[int, float, float, float]:
    """(form, lowest code, highest code, factor) as the native CPU quantizers take them."""
    levels, factor = levels_and_factor(form, bits)
    if form == "fp8":
        return rows.FLOAT8, -levels, levels, factor
    if form == "half":
        return rows.HALF_INTEGER, -levels, levels - 1, factor
    return rows.INTEGER, -levels, levels, factor


def code_dtype(form: str) -> torch.dtype:
    """The dtype of the codes: e4m3 or int8."""
    return E4M3 if form == "fp8" else torch.int8
