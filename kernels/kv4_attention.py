"""Attention over INT4 keys and values, with FP8 queries: FireQ's attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cpu import kv4 as native
from .cpu.prompt_attention import attend
from .dispatch import Op
from .gpu_layout import has_fp8
from .kv4 import check_packed, check_planar, fits_gpu, interleaved, kv4_dequantize, split
from .quantize_fp8 import E4M3, E4M3_MAX, quantize_fp8, safe_divisor

PRODUCTS = ("exact", "fp8")


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None = None,
    quantize_query: bool = True,
    length: torch.Tensor | None = None,
    window: int = 0,
    planar: bool = False,
    products: str = "exact",
) -> torch.Tensor:
    """softmax(scaling * q k^T + mask) v -> [B, Hq, T, D] in query's dtype, in float32 inside.

    q = query / post_scale, rounded to FP8 per token and head where `quantize_query`; k and v are
    the unpacked keys (which were multiplied by post_scale before they were packed) and values.
    FireQ (arXiv 2505.20839), RoPE-aware attention.

    Args:
        query: [B, Hq, T, D] bf16, fp16 or float32, after RoPE.
        key, value: uint8 [B, Hkv, S, P] from `kv4_quantize`; Hkv divides Hq.
        mask: [B or 1, 1 or Hq, T, S], bool (True: attend) or additive; or None. A row that is
            masked entirely with False or -inf gives zeros.
        scaling: the factor of the scores, 1 / sqrt(D) as a rule.
        is_causal: query t sees keys up to S - T + t; used only where mask is None.
        post_scale: float32 [Hkv, D] or None.
        quantize_query: round the query to FP8.
        length: int64, one number: only so many of the S keys are there (what a static cache holds);
            S in this text is then that number, but for the mask's S. None: all.
        window: where causal, a query sees only so many of the last keys; 0: all of them.
        planar: the caches' layout, see `kv4.planes`.

    Where `products` is "fp8" the weights of a query, times the values' scales, are rounded to e4m3
    before the product with the values' codes, the largest of them to 448: FireQ's P x 448, with the
    scales in it. A kernel that meets the keys in tiles takes the largest so far: the same rounding of
    numbers that differ by what the largest grew. "exact" keeps them in 16 bits or more.

    Raises:
        ValueError: the shapes do not fit together, or `products` is unknown.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    key, value, mask = _cut(key, value, mask, dim, length, planar)
    q = prepare_query(query, kv_heads, post_scale, quantize_query, torch.float32)
    q = q.reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    k = kv4_dequantize.reference(key, dim, torch.float32)[:, :, None]
    v = kv4_dequantize.reference(value, dim, torch.float32)[:, :, None]
    scores = (q @ k.transpose(-1, -2)) * scaling
    if mask is None and is_causal:
        mask = causal_mask(tokens, key.shape[2], query.device, window)
    if mask is not None:
        grouped = mask if mask.dim() < 4 else _group_heads(mask, kv_heads)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~grouped, -torch.inf)
        else:
            scores = scores + grouped
    # A row of -inf alone would be NaN; such a query attends to nothing and gives zeros.
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    if products == "fp8":
        return fp8_weights(weights, v, value, dim).reshape(query.shape).to(query.dtype)
    return (weights @ v).reshape(query.shape).to(query.dtype)


def fp8_weights(
    weights: torch.Tensor, v: torch.Tensor, value: torch.Tensor, dim: int
) -> torch.Tensor:
    """weights [B, Hkv, G, T, S] @ v [B, Hkv, 1, S, D], rounded as `products="fp8"` says."""
    scale = split(value, dim)[1].float()[:, :, None]
    divisor = safe_divisor(scale)
    scaled = weights * scale.transpose(-1, -2)
    unit = safe_divisor(scaled.abs().amax(dim=-1, keepdim=True) / E4M3_MAX)
    return ((scaled / unit).to(E4M3).float() * unit) @ (v / divisor)


def _cut(
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dim: int,
    length: torch.Tensor | None,
    planar: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values and mask of the tokens that are there, every vector followed by its scale."""
    key, value = interleaved(key, dim, planar), interleaved(value, dim, planar)
    if length is None:
        return key, value, mask
    there = int(length)
    return key[:, :, :there], value[:, :, :there], None if mask is None else mask[..., :there]


def _group_heads(mask: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B or 1, 1 or Hq, T, S] -> [B or 1, 1 or Hkv, 1 or group, T, S]."""
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mask.unflatten(1, (kv_heads, -1))


def prepare_query(
    query: torch.Tensor,
    kv_heads: int,
    post_scale: torch.Tensor | None,
    quantize_query: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """query [B, Hq, T, D] -> query / post_scale [Hkv, D], rounded to FP8 if asked, in `dtype`."""
    if post_scale is None and not quantize_query:
        return query.to(dtype)
    q = query.float()
    if post_scale is not None:
        group = query.shape[1] // kv_heads
        q = q / post_scale.float().repeat_interleave(group, dim=0)[:, None]
    if quantize_query:
        values, scale = quantize_fp8.reference(q)
        q = values.float() * scale
    return q.to(dtype)


def causal_mask(tokens: int, length: int, device: torch.device, window: int = 0) -> torch.Tensor:
    """bool [T, S], True where query t may see key s: s <= S - T + t, and s > S - T + t - window if there is one."""
    seen = torch.ones(tokens, length, dtype=torch.bool, device=device)
    seen = seen.tril(diagonal=length - tokens)
    return seen.triu(diagonal=length - tokens - window + 1) if window else seen


def _cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None = None,
    quantize_query: bool = True,
    length: torch.Tensor | None = None,
    window: int = 0,
    planar: bool = False,
    products: str = "exact",
) -> torch.Tensor:
    if products == "fp8":
        return _reference(
            query, key, value, mask, scaling, is_causal, post_scale, quantize_query, length, window,
            planar, products,
        )  # fmt: skip
    _, heads, tokens, dim = query.shape
    if length is not None and not planar:
        key, value, mask = _cut(key, value, mask, dim, length, planar)
    there = key.shape[2] if length is None else int(length)
    causal = mask is None and is_causal
    narrow = causal and 0 < window < there
    if tokens * heads <= native.MOST_ROWS * key.shape[1]:
        if narrow:
            mask = causal_mask(tokens, there, query.device, window)[None, None]
        found = native.attention(
            query, key, value, mask, scaling, is_causal, post_scale, quantize_query, there, planar
        )
        if found is not None:
            return found
    if planar:
        key, value, mask = _cut(key, value, mask, dim, length, planar)
    kv_heads, there = key.shape[1], key.shape[2]
    q = native.query(query, kv_heads, post_scale, quantize_query)
    if q is None:
        q = prepare_query(query, kv_heads, post_scale, quantize_query, query.dtype)
    k, v = (kv4_dequantize(packed, dim, query.dtype) for packed in (key, value))
    attended = attend(q, k, v, scaling, window) if causal else None
    if attended is not None:
        return attended.transpose(1, 2).contiguous()
    if causal and (narrow or 1 < tokens < there):
        mask, is_causal = causal_mask(tokens, there, query.device, window), False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        # torch aligns its causal mask to the first key: right only where T = S.
        is_causal=is_causal and mask is None and tokens == there,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    return out.contiguous()


def _triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None = None,
    quantize_query: bool = True,
    length: torch.Tensor | None = None,
    window: int = 0,
    planar: bool = False,
    products: str = "exact",
) -> torch.Tensor:
    from .gpu import kv4_attention as gpu

    return gpu.attention(
        query,
        key,
        value,
        mask,
        scaling,
        is_causal,
        post_scale,
        quantize_query,
        length,
        window,
        planar,
        products,
    )


def _supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None = None,
    quantize_query: bool = True,
    length: torch.Tensor | None = None,
    window: int = 0,
    planar: bool = False,
    products: str = "exact",
) -> bool:
    dim = query.shape[3]
    fits = all(fits_gpu(cache, dim) for cache in (key, value))
    same = key.shape == value.shape and key.stride() == value.stride()
    if products == "fp8" and not has_fp8(query.device):
        return False
    return fits and same and dim % 4 == 0 and dim <= 256 and query.dtype != torch.float64


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None = None,
    quantize_query: bool = True,
    length: torch.Tensor | None = None,
    window: int = 0,
    planar: bool = False,
    products: str = "exact",
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"query must be [B, Hq, T, D], key and value [B, Hkv, S, P]: {shapes}")
    if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
        raise ValueError(f"the batches must agree and Hkv divide Hq: {shapes}")
    dim = query.shape[3]
    check_packed(key, dim)
    check_packed(value, dim)
    if is_causal and mask is None and query.shape[2] > key.shape[2]:
        raise ValueError(f"causal attention needs T <= S: {shapes}")
    if mask is not None and (mask.dim() != 4 or mask.shape[-1] != key.shape[2]):
        raise ValueError(f"mask must be [B or 1, 1 or Hq, T, S], got {tuple(mask.shape)}: {shapes}")
    if post_scale is not None and post_scale.shape != (key.shape[1], dim):
        raise ValueError(f"post_scale must be [Hkv, D], got {tuple(post_scale.shape)}: {shapes}")
    if length is not None and (length.numel() != 1 or length.is_floating_point()):
        raise ValueError(f"length must be one integer, got {length.dtype} {tuple(length.shape)}")
    if products not in PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(PRODUCTS)}, got {products!r}")
    if window < 0:
        raise ValueError(f"window must be 0 (none) or more, got {window}")
    if planar:
        check_planar(key)
        check_planar(value)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None = None,
    quantize_query: bool = True,
    length: torch.Tensor | None = None,
    window: int = 0,
    planar: bool = False,
    products: str = "exact",
) -> torch.Tensor:
    return query.new_empty(query.shape)


kv4_attention = Op(
    "kv4_attention",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_supports,
)
