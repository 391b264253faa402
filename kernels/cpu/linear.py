"""The native CPU products of INT4 and INT8 weights, called on torch tensors."""

from __future__ import annotations

from functools import lru_cache

import torch

from . import native

_KINDS = {torch.bfloat16: 0, torch.float8_e4m3fn: 1, torch.int8: 2}
_HALF_KIND = 3
_ROWS = 64  # outputs of a block; both products work on whole ones
_INPUTS = 32  # inputs of a tile


def int4(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    half: bool = False,
) -> torch.Tensor | None:
    """row_scale * (x @ w^T) + bias -> [..., N], with float32 sums; None where it cannot be had.

    Scales are applied to the sums of groups. With AMX, bf16 results of more than 64 rows of bf16 or e4m3 are of weights
    rounded to bf16 instead: 2^-9 a weight.

    Args:
        x: [..., K] bf16, e4m3 or int8; int8 is n + 1/2 where `half`.
        weight: uint8 [N, K / 2] from `int4pack.repack`.
        scale: bf16 [G, N, 2] from there; q * scale, or (q + 1/2) * scale where `half`.
        row_scale: float32 [..., 1] or None.
        bias: [N] or None.
        out_dtype: of the result; float16 comes by way of float32.
    """
    library = native.library()
    n, k, groups = weight.shape[0], weight.shape[1] * 2, scale.shape[0]
    if (
        library is None
        or weight.dtype != torch.uint8
        or scale.dim() != 3
        or scale.dtype != torch.bfloat16
        or x.dtype not in _KINDS
        or n % _ROWS
        or (k // groups) % _INPUTS
        or not _layout_is_torchs()
    ):
        return None
    out = x.new_empty((*x.shape[:-1], n), dtype=_written(out_dtype))
    x = _rows(x)
    row_scale, bias = _as_float(row_scale), _as_float(bias)
    kind = _HALF_KIND if half and x.dtype == torch.int8 else _KINDS[x.dtype]
    if x.shape[0]:
        failed = library.quantkit_int4_linear(
            x.data_ptr(),
            x.stride(0) * x.element_size(),
            kind,
            weight.data_ptr(),
            scale.data_ptr(),
            half,
            _address(row_scale),
            _address(bias),
            out.data_ptr(),
            out.dtype == torch.float32,
            *(x.shape[0], n, k, k // groups),
            torch.get_num_threads(),
            native.level(),
        )
        _check(failed, out)
    return out.to(out_dtype)


def pack_int4(words: torch.Tensor) -> torch.Tensor | None:
    """Stored int32 [N, K / 8] -> torch's native CPU layout uint8 [N, K / 2]; None where it cannot be had."""
    n = words.shape[0]
    if native.library() is None or n % _ROWS or not _layout_is_torchs():
        return None
    return _pack_int4(words)


@lru_cache(maxsize=1)
def _layout_is_torchs() -> bool:
    """Whether torch's INT4 layout on this machine is the one that the C++ reads (AVX-512's)."""
    if native.library() is None:
        return False
    words = torch.arange(128 * 5, dtype=torch.int32).mul_(0x9E3779B1 - 2**32).view(128, 5)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    unsigned = ((words[:, :, None] >> shifts) & 15).reshape(128, 40)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)
    return bool(torch.equal(theirs.flatten(), _pack_int4(words).flatten()))


def _pack_int4(words: torch.Tensor) -> torch.Tensor:
    library = native.library()
    assert library is not None
    n, k = words.shape[0], words.shape[1] * 8
    words = words.contiguous()
    packed = torch.empty(n, k // 2, dtype=torch.uint8)
    library.quantkit_int4_pack(words.data_ptr(), n, k, packed.data_ptr(), torch.get_num_threads())
    return packed


def int8(
    xq: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor | None:
    """row_scale * scale * (xq @ weight^T) + bias -> [..., N], exact sums; None where it cannot be had.

    Args:
        xq: int8 [..., K].
        weight: int8 [N, K].
        scale: [N, 1].
        row_scale: float32 [..., 1].
        bias: [N] or None.
        out_dtype: of the result; float16 comes by way of float32.
    """
    library = native.library()
    n, k = weight.shape
    if library is None or n % _ROWS or k % 64 or not weight.is_contiguous():
        return None
    out = xq.new_empty((*xq.shape[:-1], n), dtype=_written(out_dtype))
    xq = _rows(xq)
    scale, bias = scale.float().contiguous(), _as_float(bias)
    if xq.shape[0]:
        failed = library.quantkit_int8_linear(
            xq.data_ptr(),
            xq.stride(0),
            weight.data_ptr(),
            scale.data_ptr(),
            _address(row_scale),
            _address(bias),
            out.data_ptr(),
            out.dtype == torch.float32,
            *(xq.shape[0], n, k),
            torch.get_num_threads(),
            native.level(),
        )
        _check(failed, out)
    return out.to(out_dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [M, K] whose rows are contiguous."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _written(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 else torch.float32


def _as_float(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _address(vector: torch.Tensor | None) -> int | None:
    """Of a tensor that the caller keeps alive."""
    return None if vector is None else vector.data_ptr()


def _check(failed: int, out: torch.Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory for the scratch space of a product {tuple(out.shape)}")
