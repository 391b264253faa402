"""Roundings that give the same bits compiled and in Triton's interpreter.

The interpreter truncates float32 to bf16 and casts to e4m3 wrongly, and GPUs before compute capability
8.9 have no e4m3 at all: there the bits are made by integer arithmetic. Elsewhere it is one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting

E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, half to even.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


def by_hand(device: torch.device) -> bool:
    """Whether e4m3 must be made by integer arithmetic on this device."""
    return interpreting() or torch.cuda.get_device_capability(device) < (8, 9)


@triton.jit
def round_even(x):
    """float32, |x| < 2^22, to the nearest integer, half to even."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def divide(y, scale, INTERPRET: tl.constexpr):
    """y / scale for few scales, correctly rounded: a reciprocal and one correction (Markstein).

    Division itself would be a third of a row kernel's instructions. Below 2^-128, whose reciprocal no
    float32 holds, the quotient is only near.
    """
    if INTERPRET:  # which has no fused multiply-add
        return tl.div_rn(y, tl.zeros_like(y) + scale)
    else:
        reciprocal = tl.minimum(tl.div_rn(1.0, scale), 1.7014118346046923e38)
        # By infinity a number gives zero; the correction would make it NaN.
        steady = tl.where(scale < float("inf"), scale, 0.0)
        quotient = y * reciprocal
        return tl.fma(tl.fma(-quotient, steady, y), reciprocal, quotient)


@triton.jit
def to_e4m3_bits(x, BY_HAND: tl.constexpr):
    """float32 within +-448 (or NaN) -> the bits of its e4m3 value, uint8."""
    if BY_HAND:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Three bits of mantissa stay; the exponent's bias goes from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the values are multiples of 2^-9.
        tiny = round_even(magnitude.to(tl.float32, bitcast=True) * 512.0).to(tl.uint32)
        code = tl.where(magnitude < 0x3C800000, tiny, normal)
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def round_to_e4m3(x):
    """float32 within +-448 to the nearest e4m3 number, still as float32."""
    bits = x.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.015625, round_even(x * 512.0) * 0.001953125, normal)


@triton.jit
def from_e4m3_bits(code):
    """The bits of e4m3 numbers, as integers -> float32."""
    # Seven bits of exponent and mantissa at a float32's place are the value times 2^-120.
    bits = code.to(tl.uint32)
    magnitude = bits & 0x7F
    wide = (magnitude << 20) | ((bits & 0x80) << 24)
    value = wide.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def round_to(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 -> `dtype`'s precision (bf16, fp16 or float32), still as float32."""
    if dtype == tl.float32:
        return x
    elif INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x != x, x, rounded.to(tl.float32, bitcast=True))
    else:
        return x.to(dtype).to(tl.float32)
