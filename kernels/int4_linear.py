"""INT4 weights, 16-bit or float32 activations (W4A16)."""

from __future__ import annotations

import torch

from . import int4_weight
from .cpu import linear
from .dispatch import Op


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = x @ (q * scale)^T + bias in x's dtype, accumulated in float32.

    Args:
        x: [..., K] bf16, fp16 or float32.
        weight: int32 [N, K / 8] as stored, or uint8 [N, K / 2] from `int4pack.repack`.
        scale: [N, G] for groups of K / G inputs ([N, 1]: per channel), or [G, N, 2].
        bias: [N] or None.

    Raises:
        ValueError: the shapes do not fit together.
    """
    dense = int4_weight.dequantize(weight, scale, torch.float32)
    y = x.reshape(-1, x.shape[-1]).float() @ dense.t()
    return int4_weight.finish(y, None, bias, (*x.shape[:-1], len(dense)), x.dtype)


def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    fused = linear.int4(x, weight, scale, None, bias, x.dtype)
    if fused is not None:
        return fused
    rows = x.reshape(-1, x.shape[-1])
    # Half precision has no native product and a small range: float32 serves it.
    rows = rows if x.dtype == torch.bfloat16 else rows.float()
    y = int4_weight.matmul(rows, weight, scale)
    return int4_weight.finish(y, None, bias, (*x.shape[:-1], len(weight)), x.dtype)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    int4_weight.check(x, weight, scale, bias)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bf16, fp16 or float32, got {x.dtype} {tuple(x.shape)}")


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


int4_linear = Op("int4_linear", _reference, check=_check, fake=_fake, cpu=_cpu)
