"""INT4 weights in groups, INT8 (or INT4) activations per token (W4A8, W4A4), on integers or half-integers."""

from __future__ import annotations

import torch

from . import int4_weight
from .cpu import linear
from .dispatch import Op
from .int4_fp8_linear import check_row_scale


def _reference(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    """y [..., N] = x_scale * sum_g scale_g * (xq_g @ q_g^T) + bias.

    Each group's sum is exact (below 2^24, or quarters below 2^22, so in float32 too); the scales apply in float32.

    Args:
        xq: int8 [..., K].
        x_scale: float32 [..., 1], one per token.
        weight: int32 [N, K / 8] as stored, or uint8 [N, K / 2] from `int4pack.repack`.
        scale: [N, G] for groups of K / G inputs ([N, 1]: per channel), or [G, N, 2].
        bias: [N] or None.
        out_dtype: the output's.
        half: codes of both sides are on QuEST's half-integer grid, n + 1/2; see `hadamard_int4_linear`.
        residual: [..., N], added to the rounded output, or None.
        gate: weight rows [0, N / 2) are a gate, the others what it multiplies: the output is
            [..., N / 2] = silu(first half) * second half (+ residual of that shape).

    Raises:
        ValueError: the shapes do not fit together.
    """
    codes, scales = int4_weight.codes_and_scales(weight, scale)
    groups = scales.shape[1]
    offset = 0.5 if half else 0.0
    x_groups = (xq.reshape(-1, xq.shape[-1]).float() + offset).chunk(groups, dim=1)
    y = torch.zeros(len(x_groups[0]), len(codes), device=xq.device)
    for index, (x_part, code_part) in enumerate(zip(x_groups, codes.chunk(groups, dim=1))):
        y += (x_part @ (code_part.t().float() + offset)) * scales[:, index].float()
    return int4_weight.finish(
        y, x_scale, bias, (*xq.shape[:-1], len(codes)), out_dtype, residual, gate
    )


def _cpu(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    # INT8 values, and n + 1/2, are exact in bf16; a float32 result needs float32 partial sums.
    written = torch.float32 if gate else out_dtype
    fused = linear.int4(xq, weight, scale, x_scale, bias, written, half)
    if fused is not None:
        return int4_weight.last(fused, residual, gate, out_dtype)
    wide = int4_weight.product_dtype(weight, out_dtype)
    values = xq.reshape(-1, xq.shape[-1]).to(wide)
    y = int4_weight.matmul(values + 0.5 if half else values, weight, scale, half)
    return int4_weight.finish(
        y, x_scale, bias, (*xq.shape[:-1], len(weight)), out_dtype, residual, gate
    )


def _triton(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    from .gpu.linear import int4

    return int4(
        "int4_int8_linear", xq, weight, scale, x_scale, bias, out_dtype,
        half_integer=half, residual=residual, gate=gate,
    )  # fmt: skip


def _supports(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> bool:
    return int4_weight.for_gpu(weight, scale, torch.int8)


def _check(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> None:
    int4_weight.check(xq, weight, scale, bias)
    check_row_scale(xq, x_scale, torch.int8)
    int4_weight.check_last(xq, len(weight), residual, gate)


def _fake(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    return xq.new_empty((*xq.shape[:-1], weight.shape[0] // (2 if gate else 1)), dtype=out_dtype)


int4_int8_linear = Op(
    "int4_int8_linear",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_supports,
)
