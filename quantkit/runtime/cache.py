"""transformers' cache with packed INT4 keys and values.

A token's keys of one head, packed, are one uint8 vector with the scale in its last bytes, so transformers'
own cache layers hold them as they hold any vector: concatenating, cropping, reordering for beam search
and repeating work unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from quantkit.errors import QuantkitError
from quantkit.kernels.kv4_append import kv4_append
from quantkit.runtime.attention import KVQuantizer, PackedAttention

_ALIGNED = 16  # tokens whose scales of one byte fill what a GPU reads at once
_LEAST_ROOM = 64  # tokens that a growing layer begins with


class _Packed:
    """Packs what comes in; everything else is the layer's own."""

    quantizer: KVQuantizer
    empty = True  # known on the host, where a static layer's length is not

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = self.quantizer.fresh_prompts and self.empty and key_states.shape[2] > 1
        self.empty = False
        packed = self.quantizer.pack(key_states, value_states)
        kept = super().update(*packed, *args, **kwargs)  # type: ignore[misc]
        return (key_states, value_states) if fresh else kept

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.empty = True


class PackedLayer(_Packed, DynamicLayer):
    """A growing layer: `keys` and `values` are the used part of buffers with room for more."""

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self._buffers: list[torch.Tensor] = []
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length, tokens = self.get_seq_length(), key_states.shape[2]
        self._make_room(key_states, tokens)
        fresh = self.quantizer.fresh_prompts and not length and tokens > 1
        packed = self.quantizer.pack(key_states, value_states)
        for buffer, new in zip(self._buffers, packed, strict=True):
            buffer[:, :, length : length + tokens] = new
        kept = self._grow(length + tokens)
        return (key_states, value_states) if fresh else kept

    def append(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`update` of keys before RoPE -> (query after RoPE, packed keys, packed values)."""
        length, tokens = self.get_seq_length(), key.shape[2]
        self._make_room(key, tokens)
        positions = torch.arange(length, length + tokens, device=key.device)
        factor = self.quantizer.post_scale
        query = kv4_append(query, key, value, cos, sin, *self._buffers, positions, factor)
        return query, *self._grow(length + tokens)

    def reset(self) -> None:
        super().reset()
        self._buffers, self._views = [], None

    def _make_room(self, key: torch.Tensor, tokens: int) -> None:
        """Buffers of their own for the tokens that are there and `tokens` more."""
        length = self.get_seq_length()
        views = self._views
        # Cropping and reordering put other tensors in the place of the views.
        ours = views is not None and views[0] is self.keys and views[1] is self.values
        if ours and length + tokens <= self._buffers[0].shape[2] and _writable(self._buffers[0]):
            return
        # Half as much again, so that a token is copied a constant number of times.
        room = max(_LEAST_ROOM, length + tokens + length // 2)
        shape = (*key.shape[:2], room, self.quantizer.packed_size(key.shape[3]))
        buffers = [torch.empty(shape, dtype=torch.uint8, device=key.device) for _ in range(2)]
        if length:
            buffers[0][:, :, :length] = self.keys
            buffers[1][:, :, :length] = self.values
        self._buffers = buffers

    def _grow(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values, self._views = keys, values, (keys, values)
        self.empty = not length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return keys, values


class PackedSlidingWindowLayer(_Packed, DynamicSlidingWindowLayer):
    def __init__(self, quantizer: KVQuantizer, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.quantizer = quantizer


class PackedStaticLayer(_Packed, StaticLayer):
    """A layer of a fixed size.

    Args:
        quantizer: of the attention layer.
        max_cache_len: in tokens; rounded up where planar, so that every head's bytes are aligned.
        planar: codes and scales lie apart (see `kernels.kv4.planes`), which only `append` knows to write
            and `PackedAttention` to read.
    """

    def __init__(self, quantizer: KVQuantizer, max_cache_len: int, planar: bool = False) -> None:
        if planar:
            max_cache_len = -(-max_cache_len // _ALIGNED) * _ALIGNED
        super().__init__(max_cache_len=max_cache_len)
        self.quantizer, self.planar = quantizer, planar

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.planar:
            raise RuntimeError("this cache belongs to a model whose attention appends to it itself")
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def length(self) -> torch.Tensor:
        """int64, one number: the tokens that are there."""
        return self.cumulative_length

    def append(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`update` of keys before RoPE -> (query after RoPE, packed keys, packed values)."""
        tokens = key.shape[2]
        self.empty = False
        if not self.is_initialized:
            size = self.quantizer.packed_size(key.shape[3])
            empty = torch.empty((*key.shape[:2], 0, size), dtype=torch.uint8, device=key.device)
            self.lazy_initialization(empty, empty)
        positions = torch.arange(tokens, device=key.device) + self.cumulative_length
        self.cumulative_length.add_(tokens)
        factor = self.quantizer.post_scale
        query = kv4_append(
            query, key, value, cos, sin, self.keys, self.values, positions, factor, self.planar
        )
        return query, self.keys, self.values


class PackedStaticSlidingWindowLayer(_Packed, StaticSlidingWindowLayer):
    def __init__(self, quantizer: KVQuantizer, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len=max_cache_len, sliding_window=sliding_window)
        self.quantizer = quantizer


def _writable(buffer: torch.Tensor) -> bool:
    """torch forbids writing to a tensor of inference mode outside it."""
    return not buffer.is_inference() or torch.is_inference_mode_enabled()


def quantizers(model: nn.Module) -> list[KVQuantizer]:
    """The model's KV quantizers in the order of its layers."""
    return [attention.kv_quantizer for attention in _attentions(model)]


def _attentions(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(getattr(m, "kv_quantizer", None), KVQuantizer)]


def packed_cache(model: Any, max_length: int | None = None) -> Cache:
    """An empty cache for a model of ours, with sliding windows where the model has them.

    Args:
        max_length: of the sequences, for a cache of that fixed size (what torch.compile and CUDA graphs
            need); left out, the cache grows.
    """
    config = model.config.get_text_config(decoder=True)
    static = max_length is not None
    cache = StaticCache(config, max_cache_len=max_length) if static else DynamicCache(config=config)
    for number, (layer, attention) in enumerate(zip(cache.layers, _attentions(model), strict=True)):
        planar = isinstance(attention, PackedAttention)
        cache.layers[number] = _packed_layer(number, layer, attention.kv_quantizer, planar)
    return cache


def _packed_layer(number: int, layer: Any, quantizer: KVQuantizer, planar: bool) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return PackedSlidingWindowLayer(quantizer, layer.sliding_window)
    if type(layer) is DynamicLayer:
        return PackedLayer(quantizer)
    if type(layer) is StaticSlidingWindowLayer:
        # transformers already took the smaller of the window and the length.
        return PackedStaticSlidingWindowLayer(quantizer, layer.max_cache_len, layer.max_cache_len)
    if type(layer) is StaticLayer:
        return PackedStaticLayer(quantizer, layer.max_cache_len, planar)
    raise QuantkitError(
        f"layer {number}: no packed form of {type(layer).__name__}; quantize without kv_cache"
    )


def generate_with_packed_cache(model: Any) -> None:
    """Make `model.generate` use the packed cache, growing or static as it was asked for.

    A cache that the caller passes is left alone.
    """
    prepare = model._prepare_cache_for_generation

    def prepare_packed(
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        wanted = generation_config.cache_implementation
        given = model_kwargs.get("past_key_values") is not None
        if given or generation_config.use_cache is False:
            return prepare(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if wanted not in (None, "dynamic", "static"):
            raise QuantkitError(
                f"cache_implementation={wanted!r}: this model's cache is packed INT4; "
                "leave it out, or use 'dynamic' or 'static'"
            )
        length = None
        if wanted == "static":
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        generation_config.cache_implementation = None
        model_kwargs["past_key_values"] = packed_cache(model, length)
        return None

    model._prepare_cache_for_generation = prepare_packed
