"""The native CPU ways of INT4 keys and values, called on torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from . import native

_DTYPES = (torch.bfloat16, torch.float32)
# Queries of a key head from which expanding keys and values once, for attention of a prompt, is faster.
MOST_ROWS = 32
_WIDEST = 1024  # head_dim that the C++ has room for


def quantize(x: torch.Tensor, factor: torch.Tensor | None, float8: bool) -> torch.Tensor | None:
    """x [..., D], times factor [H, D] over the third last dimension, -> packed; None where it cannot be had."""
    library = native.library()
    if library is None or x.dtype not in _DTYPES or not x.numel() or x.shape[-1] > _WIDEST:
        return None
    # The last two dimensions before D keep their strides, those before them become one.
    rows = x[None, None] if x.dim() == 2 else x[None] if x.dim() == 3 else x
    rows = rows[None, None, None] if x.dim() == 1 else rows
    rows = rows.reshape(-1, *rows.shape[-3:])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    token = x.shape[-1] // 2 + (1 if float8 else 2)
    out = torch.empty((*x.shape[:-1], token), dtype=torch.uint8)
    scales = None if factor is None else factor.float().contiguous()
    library.quantkit_kv4_quantize(
        *(rows.data_ptr(), x.dtype == torch.float32, _sizes(rows.stride()), _sizes(rows.shape)),
        *(None if scales is None else scales.data_ptr(), float8, out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


def append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    factor: torch.Tensor | None,
    planar: bool,
) -> torch.Tensor | None:
    """`kv4_append`; None where it cannot be had."""
    library = native.library()
    batch, heads, tokens, dim = query.shape
    caches_fit = key_cache.stride(-1) == 1 == value_cache.stride(-1)
    if library is None or query.dtype not in _DTYPES or dim > _WIDEST or not caches_fit:
        return None
    # Slots past the end would be written to whatever lies there.
    slots = positions.tolist()
    if slots and not 0 <= min(slots) <= max(slots) < key_cache.shape[2]:
        raise IndexError(f"positions must be below the cache's length {key_cache.shape[2]}")
    inputs = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, cos, sin)]
    scales = None if factor is None else factor.float().contiguous()
    positions = positions.contiguous()
    strides = [stride for t in inputs[:3] for stride in t.stride()[:3]]
    for turn in inputs[3:]:
        strides += [turn.stride(0) if turn.shape[0] > 1 else 0, turn.stride(1)]
    strides += [*_strides(key_cache, dim, planar), *_strides(value_cache, dim, planar)]
    out = torch.empty(query.shape, dtype=query.dtype)
    library.quantkit_kv4_append(
        *(t.data_ptr() for t in inputs),
        *(query.dtype == torch.float32, _sizes(strides), key_cache.data_ptr()),
        *(value_cache.data_ptr(), positions.data_ptr()),
        *(
            None if scales is None else scales.data_ptr(),
            _is_float8(key_cache, dim),
            out.data_ptr(),
        ),
        _sizes((batch, heads, key.shape[1], tokens, dim, cos.shape[-1])),
        torch.get_num_threads(),
    )
    return out


def dequantize(packed: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Packed [B, H, S, P] -> [B, H, S, head_dim] in `dtype`; None where it cannot be had."""
    library = native.library()
    if library is None or dtype not in _DTYPES or packed.dim() != 4 or not packed.numel():
        return None
    packed = packed if packed.stride(-1) == 1 else packed.contiguous()
    out = torch.empty((*packed.shape[:-1], head_dim), dtype=dtype)
    library.quantkit_kv4_dequantize(
        *(
            packed.data_ptr(),
            _sizes(_strides(packed, head_dim, False)),
            _sizes(out.shape),
            _is_float8(packed, head_dim),
        ),
        *(out.data_ptr(), dtype == torch.float32, torch.get_num_threads()),
    )
    return out


def query(
    x: torch.Tensor, kv_heads: int, post_scale: torch.Tensor | None, quantize_query: bool
) -> torch.Tensor | None:
    """Queries [B, Hq, T, D] as `kv4_attention` multiplies them, in x's dtype; None where it cannot be had."""
    library = native.library()
    batch, heads, tokens, dim = x.shape
    if library is None or x.dtype not in _DTYPES or not x.numel() or dim > _WIDEST:
        return None
    x = x if x.stride(-1) == 1 else x.contiguous()
    scales = None if post_scale is None else post_scale.float().contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    library.quantkit_kv4_query(
        *(x.data_ptr(), x.dtype == torch.float32, _sizes(x.stride())),
        *(None if scales is None else scales.data_ptr(), quantize_query, out.data_ptr()),
        *(_sizes((batch, heads, kv_heads, tokens, 0, dim)), torch.get_num_threads()),
    )
    return out


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None,
    quantize_query: bool,
    there: int | None = None,
    planar: bool = False,
) -> torch.Tensor | None:
    """`kv4_attention` for few queries over the first `there` keys; None where it cannot be had or is not faster."""
    library = native.library()
    batch, heads, tokens, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2] if there is None else there
    if (
        library is None
        or query.dtype not in _DTYPES
        or not query.numel()
        or not key.numel()
        or tokens * heads // kv_heads > MOST_ROWS
        or _is_float8(key, dim) != _is_float8(value, dim)
        or dim > _WIDEST
    ):
        return None
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    scales = None if post_scale is None else post_scale.float().contiguous()
    strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        is_causal = False
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask[..., :length].expand(batch, heads, tokens, length)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        strides = mask.stride()[:3]
    out = torch.empty(query.shape, dtype=query.dtype)
    failed = library.quantkit_kv4_attention(
        *(query.data_ptr(), query.dtype == torch.float32, _sizes(query.stride())),
        *(key.data_ptr(), _sizes(_strides(key, dim, planar))),
        *(value.data_ptr(), _sizes(_strides(value, dim, planar))),
        *(_is_float8(key, dim), None if scales is None else scales.data_ptr(), quantize_query),
        None if mask is None else mask.data_ptr(),
        *(mask is not None and mask.dtype == torch.bool, _sizes(strides), scaling, is_causal),
        *(out.data_ptr(), _sizes((batch, heads, kv_heads, tokens, length, dim))),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the partial results of {tuple(query.shape)} queries")
    return out


def _is_float8(packed: torch.Tensor, head_dim: int) -> bool:
    """Whether the scale is e4m3, told by its size."""
    return packed.shape[-1] - head_dim // 2 == 1


def _strides(packed: torch.Tensor, head_dim: int, planar: bool) -> tuple[int, ...]:
    """Bytes to the next batch row, head and token; where a head's first scale is, and those to the next."""
    batch, head, token = packed.stride()[:3]
    half = head_dim // 2
    if planar:
        return batch, head, half, packed.shape[2] * half, packed.shape[3] - half
    return batch, head, token, half, token


def _sizes(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)
