"""What the INT4 linear ops share: the layouts of a weight, its expansion, the product on a CPU.

A weight comes in one of these layouts, told apart by dtypes and dimensions:
  int32 [N, K / 8] as stored, with scale [N, G];
  uint8 [N, K / 2] as `int4pack.repack` gives it for CPUs, with scales-and-zeros [G, N, 2];
  int16 [N, K / 4], int8 or uint8 [N, K / 2] as `gpu_layout.repack` gives it for GPUs, with scale [N, G].
G divides K into groups; G = 1 is one scale per output channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import gpu_layout, int4pack
from .cpu.crossing import crossing_rows
from .packing import unpack_int4

# Output rows expanded at a time: the expanded tile (1 to 4 MB) stays in the cache.
_TILE_BYTES = 2 << 20
_GPU_DTYPES = (torch.int16, torch.int8, torch.uint8)
_PER_ELEMENT = {torch.int32: 8, torch.int16: 4, torch.int8: 2, torch.uint8: 2}


def for_cpu(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the layout is the native CPU one."""
    return weight.dtype == torch.uint8 and scale.dim() == 3


def for_gpu(weight: torch.Tensor, scale: torch.Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the layout is one of the GPU's, or the one of these dtypes (see `gpu_layout`)."""
    return weight.dtype in (dtypes or _GPU_DTYPES) and scale.dim() == 2


def shape(weight: torch.Tensor, scale: torch.Tensor) -> tuple[int, int, int]:
    """(N, K, group size) of a weight in any layout."""
    n, k = weight.shape[0], weight.shape[1] * _PER_ELEMENT[weight.dtype]
    return n, k, k // scale.shape[0 if scale.dim() == 3 else 1]


def check(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise ValueError unless x [..., K], weight, scale and bias [N] fit together."""

    # Built only for a message: a decode step has a hundred checks.
    def shapes() -> str:
        return (
            f"x {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}, "
            f"scale {tuple(scale.shape)}, bias {None if bias is None else tuple(bias.shape)}"
        )

    if weight.dim() != 2 or weight.dtype not in _PER_ELEMENT:
        raise ValueError(f"weight must be int32 [N, K/8], or repacked: {shapes()}")
    rows = 1 if for_cpu(weight, scale) else 0
    if scale.dim() != (3 if rows else 2) or scale.shape[rows] != weight.shape[0]:
        raise ValueError(f"scale must be [N, G], or [G, N, 2] for a CPU: {shapes()}")
    n, k, group = shape(weight, scale)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., {k}]: {shapes()}")
    if group == 0 or k % group or k // group != scale.shape[1 - rows]:
        raise ValueError(f"the groups must divide K = {k}: {shapes()}")
    if for_gpu(weight, scale) and gpu_layout.unit(group) is None:
        raise ValueError(f"this layout wants groups of 64 n inputs, not {group}: {shapes()}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}]: {shapes()}")


def codes_and_scales(
    weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [N, K] and scales [N, G], from any layout."""
    if for_cpu(weight, scale):
        return int4pack.unpack(weight), scale[..., 0].t()
    if for_gpu(weight, scale):
        return gpu_layout.unpack(weight, shape(weight, scale)[2]), scale
    return unpack_int4(weight), scale


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, half: bool = False
) -> torch.Tensor:
    """The weight [N, K]: q * scale, or (q + 1/2) * scale where `half`."""
    codes, scales = codes_and_scales(weight, scale)
    return scaled(codes, scales, dtype, half)


def scaled(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, half: bool = False
) -> torch.Tensor:
    """codes [N, K], scales [N, G] -> [N, K]; one rounding, to `dtype`, of the exact product."""
    n, k = codes.shape
    # A bf16 product of a bf16 scale rounds once; any other scale is applied in float32 first.
    wide = dtype if scales.dtype == dtype else torch.float32
    values = codes.to(wide)
    if half:
        values += 0.5
    grouped = values.view(n, scales.shape[1], -1)
    grouped *= scales.to(wide)[:, :, None]
    return grouped.view(n, k).to(dtype)


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    half: bool = False,
    expand: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    native: bool | None = None,
) -> torch.Tensor:
    """x [M, K] @ W^T -> [M, N] in x's dtype on a CPU by torch's own ops, W in either layout.

    `expand(codes, scales) -> [rows, K]` replaces the plain q * scale (then the native product,
    which knows no other, is not used). `native` decides between the two; left out, the number of
    rows does, as measured on this machine.
    """
    n, k, group = shape(weight, scale)
    if (
        for_cpu(weight, scale)
        and expand is None
        and x.dtype == scale.dtype == torch.bfloat16
        and (len(x) <= crossing_rows() if native is None else native)
    ):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), weight, group, scale)
    if expand is None:

        def expand(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            return scaled(codes, scales, x.dtype, half)

    codes, scales = codes_and_scales(weight, scale)
    out = x.new_empty(len(x), n)
    tile = max(16, _TILE_BYTES // (k * x.element_size()) // 16 * 16)
    for first in range(0, n, tile):
        rows = slice(first, first + tile)
        out[:, rows] = F.linear(x, expand(codes[rows], scales[rows]))
    return out


def product_dtype(weight: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `matmul` multiplies quantized activations for a result in `dtype`.

    A weight as it is stored is expanded at each call, so that float32 costs little there: the sums are then
    the reference's. A repacked one is multiplied in bf16, for speed, which rounds each q * scale and sum.
    """
    exact = dtype == torch.float32 or weight.dtype == torch.int32
    return torch.float32 if exact else torch.bfloat16


def check_last(
    x: torch.Tensor, n: int, residual: torch.Tensor | None = None, gate: bool = False
) -> None:
    """Raise ValueError unless N outputs can be a gate's and residual has the output's shape."""
    if gate and n % 2:
        raise ValueError(f"a gate and its values are the halves of N, got N = {n}")
    shape = (*x.shape[:-1], n // 2 if gate else n)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, got {tuple(residual.shape)}")


def finish(
    y: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    gate: bool = False,
) -> torch.Tensor:
    """y [M, N] -> y * row_scale [M, 1] + bias [N] in float32, then `last`, as `dtype` [*shape]."""
    if row_scale is not None:
        y = y.float() * row_scale.reshape(-1, 1)
    if bias is not None:
        y = y.float() + bias.float()
    return last(y.reshape(shape), residual, gate, dtype)


def last(
    y: torch.Tensor, residual: torch.Tensor | None, gate: bool, dtype: torch.dtype
) -> torch.Tensor:
    """y [..., N] -> with `gate` silu(first half) * second half; + residual; in float32, as `dtype`.

    The output is rounded to `dtype` before the residual is added: what an addition after the op gives.
    """
    if gate:
        first, second = y.float().chunk(2, dim=-1)
        y = F.silu(first) * second
    if residual is not None:
        y = y.to(dtype).float() + residual.float()
    return y.to(dtype)
