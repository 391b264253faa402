"""Attention over INT4 keys and values, as transformers' attention function `quantkit`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.formats.scheme import KVFormat
from quantkit.kernels.cpu.prompt_attention import attend
from quantkit.kernels.kv4 import kv4_dequantize, kv4_quantize
from quantkit.kernels.kv4_append import rotate
from quantkit.kernels.kv4_attention import causal_mask, kv4_attention, prepare_query

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
        self.fresh_prompts = False  # see `quantkit.load`
        # Not persistent: a checkpoint's own tensors are the model's alone (quantkit/kv.safetensors has these).
        self.register_buffer("post_scale", post_scale, persistent=False)

    def packed_size(self, head_dim: int) -> int:
        """Bytes of a packed vector."""
        return head_dim // 2 + (2 if self.form.scale == "bf16" else 1)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys after RoPE and values, both [B, KV heads, T, D] -> packed uint8 [B, KV heads, T, D/2 + scale]."""
        scale_type = _SCALE_TYPES[self.form.scale]
        return kv4_quantize(keys, scale_type, self.post_scale), kv4_quantize(values, scale_type)

    def rounded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values as attention over packed ones sees them, in float32.

        Gradients pass through the roundings as if they were not there: packed bytes have none.
        """
        with torch.no_grad():
            dim, post = query.shape[-1], self.post_scale
            packed = self.pack(key.detach(), value.detach())
            k, v = (kv4_dequantize(part, dim, torch.float32) for part in packed)
            quantize_query = self.form.query == "fp8"
            q = prepare_query(query.detach(), key.shape[1], post, quantize_query, torch.float32)
            if post is not None:
                # Both sides of the scores carry the factor: here it is taken off again.
                k = k / post[:, None]
                q = q * post.repeat_interleave(query.shape[1] // key.shape[1], 0)[:, None]
        return query + (q - query.detach()), key + (k - key.detach()), value + (v - value.detach())


def quantkit_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    length: torch.Tensor | None = None,
    planar: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [B, H, T, D] in, [B, T, H, D] out.

    Keys and values come packed from our cache, or in 16 bits when there is none: both take the same
    rounding, so a forward over a whole text and a decode through the cache agree. `length` and `planar`
    are those of `kv4_attention`; only `PackedAttention` gives them. With `fresh_prompts` keys and values
    that come in 16 bits are taken as they are.
    """
    observer = getattr(module, "key_observer", None)
    if observer is not None:
        observer(query, key, value)
    quantizer: KVQuantizer | None = getattr(module, "kv_quantizer", None)
    if kwargs.get("softcap") is not None and quantizer is not None:
        raise QuantkitError(
            "this model caps its attention scores, which attention over packed keys does not know: "
            "quantize without kv_cache"
        )
    if quantizer is not None and torch.is_grad_enabled() and query.requires_grad:
        query, key, value = quantizer.rounded(query, key, value)
        quantizer = None
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # Calibration: what is multiplied here is rounded as in the products around it.
        query = query.to(torch.get_autocast_dtype(kind))
    if quantizer is None:
        return _attend_unpacked(
            module, query, key, value, attention_mask, scaling, dropout=dropout, **kwargs
        ), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if key.dtype != torch.uint8:
        if quantizer.fresh_prompts:
            window = kwargs.get("sliding_window") or 0
            return _attend_fresh(query, key, value, attention_mask, scaling, window), None
        key, value = quantizer.pack(key, value)
    tokens = query.shape[2]
    if length is None and attention_mask is None and 1 < tokens < key.shape[2]:
        # The first tokens of a static cache: transformers leaves out the mask, the rest is empty.
        key, value = key[:, :, :tokens], value[:, :, :tokens]
    output = kv4_attention(
        query,
        key,
        value,
        attention_mask,
        scaling,
        attention_mask is None and tokens > 1,
        quantizer.post_scale,
        quantizer.form.query == "fp8",
        length,
        planar=planar,
    )
    return output.transpose(1, 2).contiguous(), None


def _attend_unpacked(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    **settings: Any,
) -> torch.Tensor:
    """Attention as transformers' own `sdpa` gives it, [B, T, H, D], over keys and values that are not packed."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is None and _is_plain(module, settings):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        found = _attend_prompt(query, key, value, scaling)
        if found is not None:
            return found
    output, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **settings)
    return output


def _is_plain(module: Any, settings: dict[str, Any]) -> bool:
    """Whether a forward without a mask is causal attention and nothing more."""
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    more = ("softcap", "position_bias", "s_aux", "cache")
    return (
        causal and not settings.get("dropout") and all(settings.get(name) is None for name in more)
    )


def _attend_prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int = 0
) -> torch.Tensor | None:
    """[B, T, H, D] where there is something faster than torch's. Without a mask torch lets the first of more keys be seen."""
    return attend(query, key, value, scaling, window) if query.shape[2] == key.shape[2] else None


def _attend_fresh(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    window: int = 0,
) -> torch.Tensor:
    """torch's attention of a prompt [B, H, T, D] over its own keys and values [B, KV heads, T, D] -> [B, T, H, D]."""
    tokens = key.shape[2]
    found = _attend_prompt(query, key, value, scaling, window) if mask is None else None
    if found is not None:
        return found
    if mask is None and 0 < window < tokens:
        mask = causal_mask(tokens, tokens, query.device, window)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[..., :tokens],
        is_causal=mask is None and tokens > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


class PackedAttention(nn.Module):
    """An attention layer whose RoPE, key scale, quantization and writing to the cache are one pass.

    Args:
        attention: the module whose place it takes; its children keep their names. Called without one of
            our caches, it runs as it was.
    """

    adds_residual = True

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for name, child in attention.named_children():
            setattr(self, name, child)
        self._original = (attention,)  # a tuple: its children are registered here already
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The output [B, T, features], with `residual` of that shape added where one is given; no weights."""
        layers = getattr(past_key_values, "layers", ())
        layer: Any = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not hasattr(layer, "append") or position_embeddings is None:
            output, weights = self._original[0](
                hidden_states, position_embeddings=position_embeddings,
                attention_mask=attention_mask, past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
            return output if residual is None else residual + output, weights
        shared: Any = self.qkv_proj
        shape = hidden_states.shape[:-1]
        query, key, value = (
            part.view(*shape, -1, self.head_dim).transpose(1, 2)
            for part in shared(hidden_states).split(shared.sizes, dim=-1)
        )
        fresh = self.kv_quantizer.fresh_prompts and key.shape[2] > 1 and layer.empty  # type: ignore[union-attr]
        query, keys, values = layer.append(query, key, value, *position_embeddings)
        if fresh:
            turned = rotate(key, *position_embeddings)
            attended = _attend_fresh(query, turned, value, attention_mask, self.scaling)
            return self.o_proj(attended.reshape(*shape, -1), residual), None  # type: ignore[operator]
        attended, _ = quantkit_attention(
            self, query, keys, values, attention_mask, self.scaling,
            length=getattr(layer, "length", None), planar=getattr(layer, "planar", False),
        )  # fmt: skip
        return self.o_proj(attended.reshape(*shape, -1), residual), None  # type: ignore[operator]


def register() -> None:
    """Make `quantkit` known to transformers, with the masks of SDPA. May be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, quantkit_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
