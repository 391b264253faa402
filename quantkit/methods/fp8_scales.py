"""FireQ's FP8 group scales, in the form in which they are stored.

A row's scales are FP8 codes (e4m3) times one channel scale, stored as their bf16 product. The row's largest
code is 448 and 448 times the channel scale is a bf16 number, so a reader recovers both bit for bit: the
channel scale from the row's maximum, the codes by dividing (bf16 keeps 8 bits, a code has 4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.methods.rounding import Grid, group

E4M3_MAX = 448.0
# The smallest code: e4m3's smallest subnormal number. A code of zero would erase its group.
E4M3_MIN = 2.0**-9
# A row's largest scale stays within these, so that its smallest one is a normal bf16 number too.
_TOP_MIN, _TOP_MAX = 2.0**-100, torch.finfo(torch.bfloat16).max
_INT4 = Grid(4)


def store_fp8_channel(scale: Tensor) -> Tensor:
    """Scales [N, G] rounded to FP8 codes times a channel scale, as stored: bf16 numbers in float32 [N, G].

    Each row's largest code is 448 and no code is below 2^-9. Storing twice changes nothing.

    Args:
        scale: positive.

    Source: FireQ (arXiv 2505.20839), group scales in FP8; one normalisation per row instead of per tensor.
    """
    scale = scale.float()
    # bf16 moves the maximum by 2^-9 of it at most, and 448 is the nearest code to all of that range.
    top = scale.amax(1, keepdim=True).to(torch.bfloat16).float().clamp(_TOP_MIN, _TOP_MAX)
    # Tiny rows are lifted to _TOP_MIN, and still need a code of 448.
    scale = torch.where(scale == scale.amax(1, keepdim=True), top, scale)
    channel = top / E4M3_MAX
    return (_e4m3(scale / channel) * channel).to(torch.bfloat16).float()


def split_fp8_channel(stored: Tensor) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [N, G], channel scale float32 [N, 1]) of scales that `store_fp8_channel` made, bit for bit."""
    channel = stored.float().amax(1, keepdim=True) / E4M3_MAX
    return _e4m3(stored.float() / channel).to(torch.float8_e4m3fn), channel


def store_fp8_tensor(scale: Tensor, weight: Tensor, grid: Grid = _INT4) -> Tensor:
    """FireQ's own variant: one power of two per tensor, then stored per row as `store_fp8_channel` does.

    The power p is the largest for which every dequantized |q * s| stays within 448, where s is
    e4m3(p * scale), never below 2^-9. The result is s / p, rounded once more against its row's largest.

    Args:
        scale: [N, G], positive.
        weight: [N, K], whose scales they are.
        grid: the weight's levels.

    Source: FireQ (arXiv 2505.20839), tensor-wise power-of-two scaling before FP8 group scales.

    Raises:
        ValueError: K is not a multiple of G.
    """
    power = tensor_power(scale, weight, grid)
    return store_fp8_channel(_e4m3(scale.float() * power) / power)


def tensor_power(scale: Tensor, weight: Tensor, grid: Grid = _INT4) -> float:
    """The power of two of `store_fp8_tensor`; 1 for a weight that is all zeros or not finite.

    Raises:
        ValueError: K is not a multiple of G.
    """
    columns, groups = weight.shape[1], scale.shape[1]
    if columns % groups:
        raise ValueError(f"{columns} inputs do not divide into {groups} groups")
    # Codes grow with the weight, so a group's two extremes tell its largest |q|.
    parts = group(weight, columns // groups).float()
    extremes = torch.stack([parts.amin(-1), parts.amax(-1)])
    peak = float(extremes.abs().max())
    if not 0 < peak < math.inf:
        return 1.0
    # Clipping scales make |q * s| smaller than |p * w|: start well above what fits, and halve.
    exponent = min(math.floor(math.log2(E4M3_MAX / peak)) + 4, 100)
    for power in (2.0 ** (exponent - step) for step in range(8)):
        s = _e4m3(scale.float() * power)
        if float(grid.decode(grid.encode(extremes * power, s), s).abs().max()) <= E4M3_MAX:
            return power
    return power


def _e4m3(x: Tensor) -> Tensor:
    """`x` rounded to e4m3, saturating, never below its smallest number; float32."""
    return x.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).float()
