"""Weights of five to eight bits in groups: expanded some rows at a time, before an ordinary product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import int4_weight
from .dispatch import Op

# Of a weight that is expanded at a time: it stays in the cache.
_TILE_BYTES = 2 << 20


def _reference(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = x_scale * (x @ (q * scale)^T) + bias, (q + 1/2) * scale where `half`.

    Args:
        x: [..., K], the input itself, or the values of its codes; bf16 or float32 (fp16: computed in float32).
        x_scale: float32 [..., 1], the step of the codes, or None.
        weight: int8 [N, K].
        scale: bf16 or float32 [N, G] for groups of K / G inputs.
        bias: [N] or None.
        out_dtype: the output's.
        half: whether the weight's codes are half-integers.
        residual: [..., N], added to the rounded output, or None.

    Raises:
        ValueError: the shapes do not fit together.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows.float() if rows.dtype == torch.float16 else rows
    n, k = weight.shape
    out = rows.new_empty(len(rows), n)
    tile = max(16, _TILE_BYTES // (k * rows.element_size()))
    for first in range(0, n, tile):
        part = slice(first, first + tile)
        values = int4_weight.scaled(weight[part], scale[part], rows.dtype, half)
        out[:, part] = F.linear(rows, values)
    return int4_weight.finish(out, x_scale, bias, (*x.shape[:-1], n), out_dtype, residual)


def _check(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
) -> None:
    shapes = f"x {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}, scale {tuple(scale.shape)}"
    if weight.dim() != 2 or weight.dtype != torch.int8:
        raise ValueError(f"weight must be int8 [N, K]: {shapes}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point [..., {weight.shape[1]}]: {shapes}")
    if scale.dim() != 2 or len(scale) != len(weight) or weight.shape[1] % max(scale.shape[1], 1):
        raise ValueError(f"scale must be [N, G] with G a divisor of K: {shapes}")
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f"bias must be [{len(weight)}], got {tuple(bias.shape)}: {shapes}")
    int4_weight.check_last(x, len(weight), residual)


def _fake(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    half: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


wide_linear = Op("wide_linear", _reference, check=_check, fake=_fake)
