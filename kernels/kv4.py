"""INT4 keys and values: one packed vector per token and head, its scale in its last bytes."""

from __future__ import annotations

import torch

from .cpu import kv4 as native
from .dispatch import Op
from .quantize_fp8 import E4M3_MAX, safe_divisor

SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
SMALLEST_E4M3 = 2.0**-9


def _quantize(
    x: torch.Tensor, scale_dtype: str = "bfloat16", factor: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., D] -> uint8 [..., D / 2 + 2] (bf16 scale) or [..., D / 2 + 1] (e4m3 scale).

    INT4 without a zero point, per vector: s = -x_m / 8, x_m the element of the largest magnitude, is
    rounded to its storage type *first*, then q = clamp(round(x / s), -8, 7), half to even. The scale's
    sign puts x_m on the code -8, so that all sixteen codes are used (llama.cpp's Q4_0 does this with
    weights); FireQ (arXiv 2505.20839, INT4 KV cache) has max|x| / 7 and fifteen. Byte i holds element i
    (low nibble, q + 8) and element i + D / 2 (high nibble); the scale's bytes follow. A vector of zeros
    gives zeros. An e4m3 scale's magnitude is kept within [2^-9, 448]: vectors with max|x| below 8 * 2^-9
    lose resolution (never to a zero scale), those above 3584 saturate (never to NaN).

    Args:
        x: bf16, fp16 or float32; with a factor [..., H, T, D].
        scale_dtype: "bfloat16" or "float8_e4m3fn".
        factor: float32 [H, D], multiplies x first (FireQ's scale of keys after RoPE); or None.

    Raises:
        ValueError: D is odd, x is not floating point, scale_dtype is unknown, or the factor's shape does not fit.
    """
    x = x.float() if factor is None else x.float() * factor[:, None]
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    # Adding zero makes the scale of zeros a positive one.
    scale = torch.where(high > -low, high, low) / -8 + 0.0
    if scale_dtype == "float8_e4m3fn":
        scale = scale.abs().clamp(SMALLEST_E4M3, E4M3_MAX).copysign(scale)
    stored = scale.to(SCALE_DTYPES[scale_dtype])
    codes = (x / safe_divisor(stored.float())).round_().clamp_(-8, 7)
    # An empty tensor's strides would not let it be seen as bytes.
    stored = (
        stored.clone(memory_format=torch.contiguous_format)
        if stored.numel()
        else stored.new_empty(stored.shape)
    )
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    tail = stored.reshape(-1).view(torch.uint8).reshape(*x.shape[:-1], stored.itemsize)
    return torch.cat((low | (high << 4), tail), dim=-1)


def _cpu_quantize(
    x: torch.Tensor, scale_dtype: str = "bfloat16", factor: torch.Tensor | None = None
) -> torch.Tensor:
    found = native.quantize(x, factor, scale_dtype == "float8_e4m3fn")
    return _quantize(x, scale_dtype, factor) if found is None else found


def _triton_quantize(
    x: torch.Tensor, scale_dtype: str = "bfloat16", factor: torch.Tensor | None = None
) -> torch.Tensor:
    from .gpu import kv4_append as gpu

    return gpu.quantize(x, SCALE_DTYPES[scale_dtype], factor)


def _gpu_quantizes(
    x: torch.Tensor, scale_dtype: str = "bfloat16", factor: torch.Tensor | None = None
) -> bool:
    return scale_dtype != "bfloat16" or x.shape[-1] % 4 == 0


def _check_quantize(
    x: torch.Tensor, scale_dtype: str = "bfloat16", factor: torch.Tensor | None = None
) -> None:
    if x.dim() == 0 or x.shape[-1] % 2 or not x.dtype.is_floating_point:
        raise ValueError(
            f"x must be floating point [..., D] with D even, got {x.dtype} {tuple(x.shape)}"
        )
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {list(SCALE_DTYPES)}, got {scale_dtype!r}")
    if factor is not None and (x.dim() < 3 or factor.shape != (x.shape[-3], x.shape[-1])):
        raise ValueError(
            f"factor must be [H, D] for x [..., H, T, D], got {tuple(factor.shape)} for {tuple(x.shape)}"
        )


def _fake_quantize(
    x: torch.Tensor, scale_dtype: str = "bfloat16", factor: torch.Tensor | None = None
) -> torch.Tensor:
    size = x.shape[-1] // 2 + SCALE_DTYPES[scale_dtype].itemsize
    return x.new_empty((*x.shape[:-1], size), dtype=torch.uint8)


def _dequantize(
    packed: torch.Tensor, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """uint8 [..., P] from `kv4_quantize` -> [..., head_dim] in `dtype`: q * s, rounded once.

    Raises:
        ValueError: P is not head_dim / 2 plus the bytes of a scale (2: bf16, 1: e4m3).
    """
    codes, scale = split(packed, head_dim)
    wide = dtype if dtype == scale.dtype == torch.bfloat16 else torch.float32
    low, high = (codes & 15), (codes >> 4)
    values = torch.cat((low, high), dim=-1).view(torch.int8).sub_(8).to(wide)
    return values.mul_(scale.to(wide)).to(dtype)


def _cpu_dequantize(
    packed: torch.Tensor, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    found = native.dequantize(packed, head_dim, dtype)
    return _dequantize(packed, head_dim, dtype) if found is None else found


def _triton_dequantize(
    packed: torch.Tensor, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    from .gpu import kv4_expand as gpu

    return gpu.expand(packed, head_dim, dtype)


def _gpu_dequantizes(
    packed: torch.Tensor, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> bool:
    return packed.dim() == 4 and packed.stride(3) == 1 and fits_gpu(packed, head_dim)


def split(packed: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [..., P] -> (nibble pairs uint8 [..., head_dim / 2], scale [..., 1])."""
    codes, tail = packed.split((head_dim // 2, packed.shape[-1] - head_dim // 2), dim=-1)
    scale = tail.reshape(-1).view(scale_dtype_of(packed, head_dim))
    return codes, scale.reshape(*packed.shape[:-1], 1)


def planes(cache: torch.Tensor, head_dim: int, planar: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a cache uint8 [B, H, S, P]: (nibble pairs [B, H, S, head_dim / 2], scales' bytes [B, H, S, 1 or 2]).

    Args:
        planar: the codes of a head's S tokens lie together, their scales behind them: what a GPU reads
            16 bytes at a time. Else every vector is followed by its scale.
    """
    half = head_dim // 2
    if not planar:
        return cache[..., :half], cache[..., half:]
    length, size = cache.shape[2:]
    flat = cache.flatten(2)
    codes = flat[..., : length * half].unflatten(-1, (length, half))
    return codes, flat[..., length * half :].unflatten(-1, (length, size - half))


def interleaved(cache: torch.Tensor, head_dim: int, planar: bool) -> torch.Tensor:
    """The cache with every vector followed by its scale."""
    return torch.cat(planes(cache, head_dim, True), dim=-1) if planar else cache


def scale_dtype_of(packed: torch.Tensor, head_dim: int) -> torch.dtype:
    """The scale's dtype, told by its size."""
    return torch.bfloat16 if packed.shape[-1] - head_dim // 2 == 2 else torch.float8_e4m3fn


def check_packed(packed: torch.Tensor, head_dim: int) -> None:
    """Raise ValueError unless packed is uint8 [..., P] for this head_dim."""
    fits = packed.dim() > 0 and packed.shape[-1] - head_dim // 2 in (1, 2) and head_dim % 2 == 0
    if packed.dtype != torch.uint8 or not fits:
        raise ValueError(
            f"packed must be uint8 [..., {head_dim}/2 + 1 or 2], "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )


def fits_gpu(cache: torch.Tensor, head_dim: int) -> bool:
    """Whether the scales of a cache can be read as numbers: those of two bytes lie at even addresses."""
    odd = (head_dim // 2) % 2 or any(stride % 2 for stride in cache.stride()[:3])
    return cache.shape[3] - head_dim // 2 == 1 or not (odd or cache.storage_offset() % 2)


def check_planar(cache: torch.Tensor) -> None:
    """Raise ValueError unless a head's bytes lie together."""
    length, size = cache.shape[2:]
    if cache.stride()[1:] != (length * size, size, 1):
        raise ValueError(
            f"a planar cache must not be sliced by tokens, got strides {cache.stride()} "
            f"of {tuple(cache.shape)}"
        )


def _check_dequantize(
    packed: torch.Tensor, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    check_packed(packed, head_dim)


def _fake_dequantize(
    packed: torch.Tensor, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    return packed.new_empty((*packed.shape[:-1], head_dim), dtype=dtype)


kv4_quantize = Op(
    "kv4_quantize",
    _quantize,
    check=_check_quantize,
    fake=_fake_quantize,
    cpu=_cpu_quantize,
    triton=_triton_quantize,
    triton_supports=_gpu_quantizes,
)
kv4_dequantize = Op(
    "kv4_dequantize",
    _dequantize,
    check=_check_dequantize,
    fake=_fake_dequantize,
    cpu=_cpu_dequantize,
    triton=_triton_dequantize,
    triton_supports=_gpu_dequantizes,
)
