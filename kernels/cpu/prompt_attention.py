"""Attention of a prompt over 16-bit keys and values on a CPU: our own loop, or torch's where that is faster."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import native


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int = 0,
) -> torch.Tensor | None:
    """Causal attention of the last T of S tokens; None where torch's own is as fast, or knows what this does not.

    Products are added up in float32, which the softmax is in too; its weights are rounded to bfloat16 then. Gradients
    go through it, once.

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
        or not 16 <= tokens <= length
        or dim % 16
        or value.shape != (batch, kv_heads, length, dim)
        or key.shape != value.shape
        or heads % kv_heads
        or not batch
    ):
        return None
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    out: torch.Tensor
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        out = _Attention.apply(query, key, value, scaling, window)  # type: ignore[no-untyped-call]
    else:
        out, _ = _forward(query, key, value, scaling, window, keep_normalizer=False)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int,
    ) -> torch.Tensor:
        out, normalizer = _forward(query, key, value, scaling, window, keep_normalizer=True)
        ctx.save_for_backward(query, key, value, out, normalizer)
        ctx.settings = scaling, window
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value, out, normalizer = ctx.saved_tensors
        given = [query, key, value, out.transpose(1, 2), gradients[0].transpose(1, 2)]
        given = [_readable(x) for x in given]
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[:3]]
        strides = [n for x in given for n in x.stride()[:3]]
        failed = _library().quantkit_prompt_attention_backward(
            *(x.data_ptr() for x in given), (ctypes.c_int64 * 15)(*strides),
            normalizer.data_ptr(), *ctx.settings,
            *(x.data_ptr() for x in found), _sizes(query, key), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the gradients of attention over {tuple(key.shape)}")
        return found[0], found[1], found[2], None, None


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int,
    *,
    keep_normalizer: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs [B, T, Hq, D], and the logarithms of the softmax's normalizers float32 [B, Hq, T] where they are kept."""
    batch, heads, tokens, dim = query.shape
    given = [_readable(x) for x in (query, key, value)]
    # Whatever torch's defaults are.
    out = query.new_empty(batch, tokens, heads, dim)
    normalizer = None
    if keep_normalizer:
        normalizer = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    strides = [n for x in given for n in x.stride()[:3]]
    failed = _library().quantkit_prompt_attention(
        *(x.data_ptr() for x in given), (ctypes.c_int64 * 9)(*strides), scaling, window, out.data_ptr(),
        None if normalizer is None else normalizer.data_ptr(), _sizes(query, key), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the packed keys and values of {tuple(key.shape)}")
    return out, normalizer


def _library() -> ctypes.CDLL:
    library = native.library()
    assert library is not None
    return library


def _sizes(query: torch.Tensor, key: torch.Tensor) -> ctypes.Array[ctypes.c_int64]:
    batch, heads, tokens, dim = query.shape
    return (ctypes.c_int64 * 6)(batch, heads, key.shape[1], tokens, key.shape[2], dim)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """In pairs: the last dimension contiguous, the others' strides even."""
    return x if x.stride(-1) == 1 and not any(n % 2 for n in x.stride()[:3]) else x.contiguous()
