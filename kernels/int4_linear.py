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
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    """y [..., N] = x @ (q * scale)^T + bias in x's dtype, accumulated in float32.

    Args:
        x: [..., K] bf16, fp16 or float32.
        weight: int32 [N, K / 8] as stored, or uint8 [N, K / 2] from `int4pack.repack`.
        scale: [N, G] for groups of K / G inputs ([N, 1]: per channel), or [G, N, 2].
        bias: [N] or None.
        residual: [..., N], added to the rounded output, or None.
        gate: weight rows [0, N / 2) are a gate, the others what it multiplies: the output is
            [..., N / 2] = silu(first half) * second half (+ residual of that shape).

    Raises:
        ValueError: the shapes do not fit together.
    """
    dense = int4_weight.dequantize(weight, scale, torch.float32)
    y = x.reshape(-1, x.shape[-1]).float() @ dense.t()
    return int4_weight.finish(y, None, bias, (*x.shape[:-1], len(dense)), x.dtype, residual, gate)


def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    fused = linear.int4(x, weight, scale, None, bias, torch.float32 if gate else x.dtype)
    if fused is not None:
        return int4_weight.last(fused, residual, gate, x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    # Half precision has no native product and a small range: float32 serves it.
    rows = rows if x.dtype == torch.bfloat16 else rows.float()
    y = int4_weight.matmul(rows, weight, scale)
    return int4_weight.finish(y, None, bias, (*x.shape[:-1], len(weight)), x.dtype, residual, gate)


def _triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    from .gpu.linear import int4

    return int4("int4_linear", x, weight, scale, None, bias, x.dtype, residual=residual, gate=gate)


def _supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> bool:
    return int4_weight.for_gpu(weight, scale, torch.int16) and x.dtype != torch.float32


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> None:
    int4_weight.check(x, weight, scale, bias)
    int4_weight.check_last(x, len(weight), residual, gate)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be bf16, fp16 or float32, got {x.dtype} {tuple(x.shape)}")


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if gate else 1)))


int4_linear = Op(
    "int4_linear",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_supports,
)
