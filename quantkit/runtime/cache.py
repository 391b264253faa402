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
from quantkit.runtime.attention import KVQuantizer


class _Packed:
    """Packs what comes in; everything else is the layer's own."""

    quantizer: KVQuantizer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed = self.quantizer.pack(key_states, value_states)
        return super().update(*packed, *args, **kwargs)  # type: ignore[misc]


class PackedLayer(_Packed, DynamicLayer):
    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer


class PackedSlidingWindowLayer(_Packed, DynamicSlidingWindowLayer):
    def __init__(self, quantizer: KVQuantizer, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.quantizer = quantizer


class PackedStaticLayer(_Packed, StaticLayer):
    def __init__(self, quantizer: KVQuantizer, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.quantizer = quantizer


class PackedStaticSlidingWindowLayer(_Packed, StaticSlidingWindowLayer):
    def __init__(self, quantizer: KVQuantizer, max_cache_len: int, sliding_window: int) -> None:
        super().__init__(max_cache_len=max_cache_len, sliding_window=sliding_window)
        self.quantizer = quantizer


def quantizers(model: nn.Module) -> list[KVQuantizer]:
    """The model's KV quantizers in the order of its layers."""
    return [m for m in model.modules() if isinstance(m, KVQuantizer)]


def packed_cache(model: Any, max_length: int | None = None) -> Cache:
    """An empty cache for a model of ours, with sliding windows where the model has them.

    Args:
        max_length: of the sequences, for a cache of that fixed size (what torch.compile and CUDA graphs
            need); left out, the cache grows.
    """
    config = model.config.get_text_config(decoder=True)
    static = max_length is not None
    cache = StaticCache(config, max_cache_len=max_length) if static else DynamicCache(config=config)
    for number, (layer, quantizer) in enumerate(zip(cache.layers, quantizers(model), strict=True)):
        cache.layers[number] = _packed_layer(number, layer, quantizer)
    return cache


def _packed_layer(number: int, layer: Any, quantizer: KVQuantizer) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return PackedSlidingWindowLayer(quantizer, layer.sliding_window)
    if type(layer) is DynamicLayer:
        return PackedLayer(quantizer)
    if type(layer) is StaticSlidingWindowLayer:
        # transformers already took the smaller of the window and the length.
        return PackedStaticSlidingWindowLayer(quantizer, layer.max_cache_len, layer.max_cache_len)
    if type(layer) is StaticLayer:
        return PackedStaticLayer(quantizer, layer.max_cache_len)
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
