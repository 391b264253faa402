"""Attention of a prompt over 16-bit keys and values on a CPU: our own loop, or torch's where that is faster."""

from __future__ import annotations

import ctypes

import torch

from . import native


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int = 0,
) -> torch.Tensor | None:
    """Causal attention of the last T of S tokens; None where torch's own is as fast, or knows what this does not.

    Products are added up in float32, which the softmax is in too; its weights are rounded to bfloat16 then.

    Args:
        query: bfloat16 [B, Hq, T, D].
        key, value: [B, H, S, D], S >= T; H divides Hq. They are rounded to bfloat16.
        scaling: of the scores.
        window: how many keys a token sees, itself among them; 0: all.

    Returns:
        bfloat16 [B, T, Hq, D].
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, length = key.shape[1:3]
    # With AMX torch's products are faster; a few queries are a decode.
    if (
        torch.compiler.is_compiling()
        or native.level() != 1
        or query.dtype != torch.bfloat16
        or any(x.device.type != "cpu" or type(x) is not torch.Tensor for x in (query, key, value))
        or (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)))
        or not 16 <= tokens <= length
        or dim % 16
        or value.shape[-1] != dim
        or not batch
    ):
        return None
    library = native.library()
    assert library is not None
    query, key, value = (_readable(x.to(torch.bfloat16)) for x in (query, key, value))
    out = torch.empty(batch, tokens, heads, dim, dtype=query.dtype)
    strides = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]]
    sizes = (batch, heads, kv_heads, tokens, length, dim)
    failed = library.quantkit_prompt_attention(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), (ctypes.c_int64 * 9)(*strides)),
        *(scaling, window, out.data_ptr(), (ctypes.c_int64 * 6)(*sizes), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for the packed keys and values of {tuple(key.shape)}")
    return out


def _readable(x: torch.Tensor) -> torch.Tensor:
    """In pairs: the last dimension contiguous, the others' strides even."""
    return x if x.stride(-1) == 1 and not any(n % 2 for n in x.stride()[:3]) else x.contiguous()
