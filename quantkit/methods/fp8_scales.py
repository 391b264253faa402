"""FireQ's FP8 group scales, in the form in which they are stored.

A row's scales are FP8 codes (e4m3) times one channel scale, stored as their bf16 product. The row's largest
code is 448 and 448 times the channel scale is a bf16 number, so a reader recovers both bit for bit: the
channel scale from the row's maximum, the codes by dividing (bf16 keeps 8 bits, a code has 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
# The smallest code: e4m3's smallest subnormal number. A code of zero would erase its group.
E4M3_MIN = 2.0**-9
_BF16_TINY = torch.finfo(torch.bfloat16).tiny


def store_fp8_channel(scale: Tensor) -> Tensor:
    """Scales [N, G] rounded to FP8 codes times a channel scale, as stored: bf16 numbers in float32 [N, G].

    Args:
        scale: positive.

    Source: FireQ (arXiv 2505.20839), group scales in FP8; one normalisation per row instead of per tensor.
    """
    scale = scale.float()
    # 448 * channel scale is this bf16 number; far from zero, so that no code times the channel scale underflows.
    top = scale.amax(1, keepdim=True).to(torch.bfloat16).float().clamp_min(_BF16_TINY * 2.0**20)
    channel = top / E4M3_MAX
    codes = _e4m3(scale / channel)
    # A maximum that bf16 rounded up would give a code below 448.
    codes = torch.where(scale == scale.amax(1, keepdim=True), E4M3_MAX, codes)
    return (codes * channel).to(torch.bfloat16).float()


def split_fp8_channel(stored: Tensor) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [N, G], channel scale float32 [N, 1]) of scales that `store_fp8_channel` made, bit for bit."""
    channel = stored.float().amax(1, keepdim=True) / E4M3_MAX
    return (stored.float() / channel).clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn), channel


def store_fp8_tensor(scale: Tensor, weight: Tensor) -> Tensor:
    """FireQ's own variant: one power of two per tensor, then stored per row as `store_fp8_channel` does.

    The power p is the largest for which p times every weight stays within e4m3's 448, so that e4m3(p * scale)
    lies high enough for its smallest numbers not to be lost.

    Args:
        scale: [N, G], positive.
        weight: [N, K], whose scales they are.

    Source: FireQ (arXiv 2505.20839), tensor-wise power-of-two scaling before FP8 group scales.
    """
    largest = weight.abs().amax().float().clamp_min(_BF16_TINY)
    # A scale's code times -8, the grid's lowest level, reaches past the largest weight.
    largest = torch.maximum(largest, 8 * scale.float().amax())
    power = torch.exp2(torch.floor(torch.log2(E4M3_MAX / largest)))
    return store_fp8_channel(_e4m3(scale.float() * power) / power)


def _e4m3(x: Tensor) -> Tensor:
    """`x` rounded to e4m3, saturating, never below its smallest number; float32."""
    return x.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).float().clamp_min(E4M3_MIN)
