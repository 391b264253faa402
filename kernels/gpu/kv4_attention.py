"""Attention over INT4 keys and values on a GPU: which of three ways.

Few queries a KV head: `kv4_decode`. More: `kv4_prefill`, which reads the packed cache too, or, where it is
predicted to be slower, 16-bit keys and values from `kv4_expand` and torch's own attention.
"""

from __future__ import annotations

import torch

from . import kv4_decode, kv4_expand, kv4_prefill
from .kv4_cache import hidden, readable

# A shorter prompt does not pay for a copy of the cache.
EXPAND_TOKENS = 256


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None,
    quantize_query: bool,
    length: torch.Tensor | None = None,
    window: int = 0,
    planar: bool = False,
    products: str = "exact",
) -> torch.Tensor:
    """`kv4_attention`: by the kernel of decoding, of prompts, or over an expanded cache."""
    batch, heads, tokens, dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    if not query.numel() or not size:
        return torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    if products == "exact" and _expands(query, size, mask, is_causal, length, window):
        from ..kv4_attention import prepare_query

        prepared = prepare_query(query, kv_heads, post_scale, quantize_query, query.dtype)
        there = size if length is None else int(length)
        return kv4_expand.attention(
            prepared, key, value, mask, scaling, is_causal, there, window, planar
        )
    keys, values = (readable(cache, dim, planar) for cache in (key, value))
    seen = hidden(mask, batch, heads, tokens)
    if heads // kv_heads * tokens <= kv4_decode.ROWS and products == "exact":
        return kv4_decode.attention(
            query,
            keys,
            values,
            seen,
            scaling,
            is_causal,
            post_scale,
            quantize_query,
            length,
            window,
        )
    return kv4_prefill.attention(
        query, keys, values, seen, scaling, is_causal, post_scale, quantize_query, length, window,
        products,
    )  # fmt: skip


def _expands(
    query: torch.Tensor,
    size: int,
    mask: torch.Tensor | None,
    is_causal: bool,
    length: torch.Tensor | None,
    window: int,
) -> bool:
    """Whether torch's attention over expanded keys is predicted to be faster."""
    tokens, dim = query.shape[2:]
    if tokens < EXPAND_TOKENS or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    gpu = kv4_prefill.capability(query.device)
    if not kv4_prefill.fits(dim, gpu):
        return True
    if mask is not None or window or kv4_prefill.faster(dim, gpu):
        return False
    # With a mask, as a part of a prompt would need, torch has no fast kernel.
    return not is_causal or tokens == (size if length is None else int(length))
