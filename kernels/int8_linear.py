"""INT8 weights per channel, INT8 activations per token (W8A8)."""

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
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    """y [..., N] = x_scale * scale * (xq @ weight^T) + bias; the integer product is exact.

    Args:
        xq: int8 [..., K].
        x_scale: float32 [..., 1], one per token.
        weight: int8 [N, K].
        scale: [N, 1], one per output channel.
        bias: [N] or None.
        out_dtype: the output's.
        residual: [..., N], added to the rounded output, or None.
        gate: weight rows [0, N / 2) are a gate, the others what it multiplies: the output is
            [..., N / 2] = silu(first half) * second half (+ residual of that shape).

    Raises:
        ValueError: the shapes do not fit together.
    """
    # float64 holds any int32 exactly, and every device has its product (CUDA has no int32 one).
    sums = xq.reshape(-1, xq.shape[-1]).double() @ weight.double().t()
    shape = (*xq.shape[:-1], len(weight))
    return _finish(sums, x_scale, scale, bias, shape, out_dtype, residual, gate)


def _cpu(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    fused = linear.int8(xq, weight, scale, x_scale, bias, torch.float32 if gate else out_dtype)
    if fused is not None:
        return int4_weight.last(fused, residual, gate, out_dtype)
    sums = torch._int_mm(xq.reshape(-1, xq.shape[-1]).contiguous(), weight.t())
    shape = (*xq.shape[:-1], len(weight))
    return _finish(sums, x_scale, scale, bias, shape, out_dtype, residual, gate)


def _triton(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    from .gpu.linear import eight_bit

    return eight_bit(
        "int8_linear", xq, weight, scale, x_scale, bias, out_dtype, residual=residual, gate=gate
    )


def _finish(
    sums: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual: torch.Tensor | None,
    gate: bool,
) -> torch.Tensor:
    y = sums.to(torch.float32) * x_scale.reshape(-1, 1)
    y *= scale.float().view(1, -1)
    if bias is not None:
        y += bias
    return int4_weight.last(y.reshape(shape), residual, gate, dtype)


def _check(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> None:

    def shapes() -> str:
        return (
            f"xq {tuple(xq.shape)}, weight {weight.dtype} {tuple(weight.shape)}, "
            f"scale {tuple(scale.shape)}, bias {None if bias is None else tuple(bias.shape)}"
        )

    if weight.dim() != 2 or weight.dtype != torch.int8:
        raise ValueError(f"weight must be int8 [N, K]: {shapes()}")
    n, k = weight.shape
    if xq.dim() == 0 or xq.shape[-1] != k:
        raise ValueError(f"xq must be [..., {k}]: {shapes()}")
    if scale.shape != (n, 1):
        raise ValueError(f"scale must be [{n}, 1]: {shapes()}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}]: {shapes()}")
    check_row_scale(xq, x_scale, torch.int8)
    int4_weight.check_last(xq, n, residual, gate)


def _fake(
    xq: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    return xq.new_empty((*xq.shape[:-1], weight.shape[0] // (2 if gate else 1)), dtype=out_dtype)


int8_linear = Op("int8_linear", _reference, check=_check, fake=_fake, cpu=_cpu, triton=_triton)
