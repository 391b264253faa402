"""Attention over INT4 keys and values, as transformers' attention function `quantkit`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.formats.scheme import KVFormat
from quantkit.kernels.kv4 import kv4_quantize
from quantkit.kernels.kv4_attention import kv4_attention

NAME = "quantkit"
_SCALE_TYPES = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}


class KVQuantizer(nn.Module):
    """How one attention layer keeps its keys and values.

    Args:
        form: the cache's format.
        post_scale: factor on keys after RoPE, float32 [KV heads, head_dim], or None; queries are divided by it.
    """

    post_scale: torch.Tensor | None

    def __init__(self, form: KVFormat, post_scale: torch.Tensor | None = None) -> None:
        super().__init__()
        self.form = form
        # Not persistent: a checkpoint's own tensors are the model's alone (quantkit/kv.safetensors has these).
        self.register_buffer("post_scale", post_scale, persistent=False)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values, both [B, KV heads, T, D] -> packed uint8 [B, KV heads, T, D/2 + scale]."""
        if self.post_scale is not None:
            keys = keys.float() * self.post_scale[:, None, :]
        scale_type = _SCALE_TYPES[self.form.scale]
        return kv4_quantize(keys, scale_type), kv4_quantize(values, scale_type)


def quantkit_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [B, H, T, D] in, [B, T, H, D] out.

    Keys and values come packed from our cache, or in 16 bits when there is none: both take the same
    rounding, so a forward over a whole text and a decode through the cache agree.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    observer = getattr(module, "key_observer", None)
    if observer is not None:
        observer(key)
    quantizer: KVQuantizer | None = getattr(module, "kv_quantizer", None)
    if quantizer is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if key.dtype != torch.uint8:
        key, value = quantizer.pack(key, value)
    tokens = query.shape[2]
    if attention_mask is None and 1 < tokens < key.shape[2]:
        # The first tokens of a static cache: transformers leaves out the mask, the rest is empty.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    output = kv4_attention(
        query,
        key,
        value,
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        attention_mask is None and tokens > 1,
        quantizer.post_scale,
        quantizer.form.query == "fp8",
    )
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `quantkit` known to transformers, with the masks of SDPA. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, quantkit_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
