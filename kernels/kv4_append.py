"""New keys and values into an INT4 cache: RoPE, scale, quantization and writing in one pass."""

from __future__ import annotations

import torch

from .cpu import kv4 as native
from .dispatch import Op
from .kv4 import check_packed, check_planar, fits_gpu, kv4_quantize, planes, scale_dtype_of


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    factor: torch.Tensor | None = None,
    planar: bool = False,
) -> torch.Tensor:
    """The query after RoPE [B, Hq, T, D]; keys after RoPE and values go packed into the caches.

    RoPE turns the pairs (i, i + R / 2) of the first R elements, each step rounded to the tensors'
    type as transformers does; then keys are multiplied by the factor, and both are quantized as
    `kv4_quantize` does. FireQ (arXiv 2505.20839), RoPE-aware INT4 keys.

    Args:
        query: [B, Hq, T, D] bf16, fp16 or float32.
        key, value: [B, Hkv, T, D] in the query's dtype.
        cos, sin: [B or 1, T, R] in the query's dtype, R even and at most D.
        key_cache, value_cache: uint8 [B, Hkv, S, P]; the scale's type is told by P. Written to.
        positions: int64 [T], the slots of the new tokens, below S and all different.
        factor: float32 [Hkv, D] or None.
        planar: the caches' layout, see `kv4.planes`.

    Raises:
        ValueError: the shapes or dtypes do not fit together.
    """
    kind = "bfloat16" if scale_dtype_of(key_cache, key.shape[-1]) == torch.bfloat16 else None
    scale_type = kind or "float8_e4m3fn"
    dim = key.shape[-1]
    for cache, packed in (
        (key_cache, kv4_quantize.reference(rotate(key, cos, sin), scale_type, factor)),
        (value_cache, kv4_quantize.reference(value, scale_type)),
    ):
        codes, scales = planes(cache, dim, planar)
        codes.index_copy_(2, positions, packed[..., : dim // 2])
        scales.index_copy_(2, positions, packed[..., dim // 2 :])
    return rotate(query, cos, sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x [B, H, T, D] by cos and sin [B or 1, T, R]; elements from R on stay."""
    turned = cos.shape[-1]
    first, second = x[..., :turned].chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    out = x[..., :turned] * cos[:, None] + swapped * sin[:, None]
    return torch.cat((out, x[..., turned:]), dim=-1)


def _cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    factor: torch.Tensor | None = None,
    planar: bool = False,
) -> torch.Tensor:
    arguments = (query, key, value, cos, sin, key_cache, value_cache, positions, factor, planar)
    found = native.append(*arguments)
    return _reference(*arguments) if found is None else found


def _triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    factor: torch.Tensor | None = None,
    planar: bool = False,
) -> torch.Tensor:
    from .gpu import kv4_append as gpu

    return gpu.append(
        query, key, value, cos, sin, key_cache, value_cache, positions, factor, planar
    )


def _supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    factor: torch.Tensor | None = None,
    planar: bool = False,
) -> bool:
    same = key_cache.stride() == value_cache.stride() and key_cache.stride(3) == 1
    return same and all(fits_gpu(cache, key.shape[3]) for cache in (key_cache, value_cache))


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    factor: torch.Tensor | None = None,
    planar: bool = False,
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    batch, _, tokens, dim = query.shape if query.dim() == 4 else (0, 0, 0, 0)
    if key.dim() != 4 or key.shape != value.shape or key.shape[::2] != (batch, tokens):
        raise ValueError(f"query must be [B, Hq, T, D], key and value [B, Hkv, T, D]: {shapes}")
    if key.shape[3] != dim or not query.dtype == key.dtype == value.dtype == cos.dtype == sin.dtype:
        raise ValueError(
            f"query, key, value, cos and sin must have one head_dim and one dtype: {shapes}"
        )
    turns = cos.shape == sin.shape and cos.dim() == 3 and cos.shape[0] in (1, batch)
    if not turns or cos.shape[1] != tokens or cos.shape[2] % 2 or cos.shape[2] > dim:
        raise ValueError(
            f"cos and sin must be [B or 1, T, R <= D], got {tuple(cos.shape)}: {shapes}"
        )
    for cache in (key_cache, value_cache):
        check_packed(cache, dim)
        if cache.dim() != 4 or cache.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"the caches must be [B, Hkv, S, P], got {tuple(cache.shape)}: {shapes}"
            )
    if key_cache.shape != value_cache.shape or positions.shape != (tokens,):
        raise ValueError(
            f"the caches must have one shape and positions be [T], got {tuple(key_cache.shape)}, "
            f"{tuple(value_cache.shape)} and {tuple(positions.shape)}: {shapes}"
        )
    if planar:
        check_planar(key_cache)
        check_planar(value_cache)
    if factor is not None and factor.shape != (key.shape[1], dim):
        raise ValueError(f"factor must be [Hkv, D], got {tuple(factor.shape)}: {shapes}")


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    factor: torch.Tensor | None = None,
    planar: bool = False,
) -> torch.Tensor:
    return query.new_empty(query.shape)


kv4_append = Op(
    "kv4_append",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_supports,
    mutates=("key_cache", "value_cache"),
)
