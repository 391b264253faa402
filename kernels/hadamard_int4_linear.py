"""Rotate, quantize on QuEST's half-integer grid, multiply by half-integer INT4 weights."""

from __future__ import annotations

import torch

from . import int4_weight
from .cpu import linear
from .dispatch import Op
from .hadamard import check as check_hadamard
from .hadamard import hadamard
from .hadamard_quantize import hadamard_quantize
from .quantize_half import GAUSSIAN_CLIP, quantize_half


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    block: int = 128,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = step * ((n_x + 1/2) @ ((n_w + 1/2) * scale)^T) + bias in x's dtype.

    (n_x, step) = quantize_half(hadamard(x, block), bits), with the rotated x in float32. The
    weight was rotated the same way before it was quantized. QuEST (arXiv 2502.05003), section 3.

    Args:
        x: [..., K] bf16, fp16 or float32.
        weight: int32 [N, K / 8] as stored, or uint8 [N, K / 2] from
            `int4pack.repack(..., half=True)`.
        scale: [N, G] for groups of K / G inputs ([N, 1]: per channel), or [G, N, 2].
        bias: [N] or None.
        bits: of the activations, 1 to 8.
        block: of the rotation, a power of two that divides K.
        residual: [..., N], added to the rounded output, or None.

    Raises:
        ValueError: the shapes do not fit together, or bits or block is out of range.
    """
    codes, step = quantize_half.reference(hadamard.reference(x.float(), block), bits)
    dense = int4_weight.dequantize(weight, scale, torch.float32, half=True)
    y = (codes.reshape(-1, x.shape[-1]).float() + 0.5) @ dense.t()
    return int4_weight.finish(y, step, bias, (*x.shape[:-1], len(dense)), x.dtype, residual)


def _cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    block: int = 128,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    codes, step = hadamard_quantize(x, "half", bits, block)
    fused = linear.int4(codes, weight, scale, step, bias, x.dtype, half=True)
    if fused is not None:
        return int4_weight.last(fused, residual, False, x.dtype)
    # n + 1/2 = (2n + 1) / 2 has at most eight significant bits: exact in bf16.
    wide = int4_weight.product_dtype(weight, x.dtype)
    values = codes.reshape(-1, x.shape[-1]).to(wide) + 0.5
    y = int4_weight.matmul(values, weight, scale, half=True)
    return int4_weight.finish(y, step, bias, (*x.shape[:-1], len(weight)), x.dtype, residual)


def _triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    block: int = 128,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    from .gpu.linear import int4

    codes, step = hadamard_quantize(x, "half", bits, block)
    return int4(
        "hadamard_int4_linear", codes, weight, scale, step, bias, x.dtype,
        half_integer=True, residual=residual,
    )  # fmt: skip


def _supports(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    block: int = 128,
    residual: torch.Tensor | None = None,
) -> bool:
    return int4_weight.for_gpu(weight, scale, torch.int8)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    block: int = 128,
    residual: torch.Tensor | None = None,
) -> None:
    int4_weight.check(x, weight, scale, bias)
    int4_weight.check_last(x, len(weight), residual)
    check_hadamard(x, block)
    if bits not in GAUSSIAN_CLIP:
        raise ValueError(f"bits must be 1 to 8, got {bits}")


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    bits: int = 8,
    block: int = 128,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


hadamard_int4_linear = Op(
    "hadamard_int4_linear",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_supports,
)
