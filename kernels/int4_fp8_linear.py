"""INT4 weights, FP8 activations (W4A8-FP8): FireQ's linear layer."""

from __future__ import annotations

import torch

from . import int4_weight
from .cpu import linear
from .dispatch import Op
from .gpu_layout import has_fp8
from .quantize_fp8 import E4M3, E4M3_MAX, safe_divisor

PRODUCTS = ("exact", "fp8")
_LARGEST_CODE = 8  # |q| <= 8: FP8 products are taken as q * (s / 8), which stays within 448


def _reference(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    products: str = "exact",
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    """y [..., N] = x_scale * (x8 @ w^T) + bias, accumulated in float32.

    `products="exact"`: w = q * scale, as if the group scale were applied in float32 to each
    group's partial sum. `products="fp8"`: w = e4m3(q * s' / 8) * 8 * channel_scale with s' the FP8
    code of the row-normalised scale, as FireQ's kernels multiply (arXiv 2505.20839, section 3);
    channel_scale = rowmax(scale) / 448, s' = e4m3(scale / channel_scale).

    Args:
        x8: e4m3 [..., K].
        x_scale: float32 [..., 1], one per token.
        weight: int32 [N, K / 8] as stored, or uint8 [N, K / 2] from `int4pack.repack`.
        scale: [N, G] for groups of K / G inputs ([N, 1]: per channel), or [G, N, 2].
        bias: [N] or None.
        out_dtype: the output's.
        products: "exact" or "fp8".
        residual: [..., N], added to the rounded output, or None.
        gate: weight rows [0, N / 2) are a gate, the others what it multiplies: the output is
            [..., N / 2] = silu(first half) * second half (+ residual of that shape).

    Raises:
        ValueError: the shapes do not fit together, or `products` is unknown.
    """
    codes, scales = int4_weight.codes_and_scales(weight, scale)
    if products == "fp8":
        dense = fp8_products(codes, scales)
    else:
        dense = int4_weight.scaled(codes, scales.float(), torch.float32)
    y = x8.reshape(-1, x8.shape[-1]).float() @ dense.t()
    return int4_weight.finish(
        y, x_scale, bias, (*x8.shape[:-1], len(dense)), out_dtype, residual, gate
    )


def split_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scales [N, G] -> (codes e4m3 [N, G], channel float32 [N, 1]), scales ~ codes * channel.

    Each row's largest code is 448; exact where the scales were stored that way.
    """
    scales = scales.float()
    channel = scales.amax(dim=1, keepdim=True) / E4M3_MAX
    codes = (scales / safe_divisor(channel)).clamp(max=E4M3_MAX).to(E4M3)
    return codes, channel


def fp8_products(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """codes int8 [N, K], scales [N, G] -> float32 [N, K], each product rounded to e4m3."""
    n, k = codes.shape
    scale_codes, channel = split_scales(scales)
    grouped = codes.float().view(n, scales.shape[1], -1)
    rounded = (grouped * (scale_codes.float() / _LARGEST_CODE)[:, :, None]).to(E4M3).float()
    return (rounded * (channel * _LARGEST_CODE)[:, :, None]).view(n, k)


def _cpu(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    products: str = "exact",
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    if products == "exact":
        fused = linear.int4(x8, weight, scale, x_scale, bias, torch.float32 if gate else out_dtype)
        if fused is not None:
            return int4_weight.last(fused, residual, gate, out_dtype)
    # FP8 values are exact in bf16; a float32 result needs float32 partial sums.
    wide = int4_weight.product_dtype(weight, out_dtype)

    def expand(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return fp8_products(codes, scales).to(wide)

    y = int4_weight.matmul(
        x8.reshape(-1, x8.shape[-1]).to(wide),
        weight,
        scale,
        expand=expand if products == "fp8" else None,
    )
    return int4_weight.finish(
        y, x_scale, bias, (*x8.shape[:-1], len(weight)), out_dtype, residual, gate
    )


def _triton(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    products: str = "exact",
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    from .gpu.linear import int4

    return int4(
        "int4_fp8_linear", x8, weight, scale, x_scale, bias, out_dtype,
        products=products, residual=residual, gate=gate,
    )  # fmt: skip


def _supports(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    products: str = "exact",
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> bool:
    if products == "fp8":  # which the layout for codes of -8, multiplied in bf16, does not serve
        return int4_weight.for_gpu(weight, scale, torch.uint8) and has_fp8(x8.device)
    if weight.dtype == torch.uint8 and not has_fp8(x8.device):
        return False
    return int4_weight.for_gpu(weight, scale, torch.uint8, torch.int16)


def _check(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    products: str = "exact",
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> None:
    int4_weight.check(x8, weight, scale, bias)
    check_row_scale(x8, x_scale, E4M3)
    int4_weight.check_last(x8, len(weight), residual, gate)
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}")


def check_row_scale(x: torch.Tensor, x_scale: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless x is `dtype` [..., K] and x_scale [..., 1]."""
    if x.dtype != dtype:
        raise ValueError(f"x must be {dtype}, got {x.dtype} {tuple(x.shape)}")
    if x_scale.shape != (*x.shape[:-1], 1):
        raise ValueError(
            f"x_scale must be {(*x.shape[:-1], 1)} for x {tuple(x.shape)}, "
            f"got {tuple(x_scale.shape)}"
        )


def _fake(
    x8: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    products: str = "exact",
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    return x8.new_empty((*x8.shape[:-1], weight.shape[0] // (2 if gate else 1)), dtype=out_dtype)


int4_fp8_linear = Op(
    "int4_fp8_linear",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_supports,
)
