"""transformers' cache with packed INT4 keys and values.

A token's keys of one head, packed, are one uint8 vector with the scale in its last bytes, so transformers'
own cache layers hold them as they hold any vector: concatenating, cropping, reordering for beam search
and repeating work unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

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


def quantizers(model: nn.Module) -> list[KVQuantizer]:
    """The model's KV quantizers in the order of its layers."""
    return [m for m in model.modules() if isinstance(m, KVQuantizer)]


def packed_cache(model: Any) -> Cache:
    """An empty cache for a model of ours; growing, with sliding windows where the model has them."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    found = quantizers(model)
    for number, (layer, quantizer) in enumerate(zip(cache.layers, found, strict=True)):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = PackedSlidingWindowLayer(quantizer, layer.sliding_window)
        elif type(layer) is DynamicLayer:
            cache.layers[number] = PackedLayer(quantizer)
        else:
            raise QuantkitError(
                f"layer {number}: no packed form of {type(layer).__name__}; quantize without kv_cache"
            )
    return cache


def generate_with_packed_cache(model: Any) -> None:
    """Make `model.generate` use the packed cache; a cache that the caller passes is left alone."""
    prepare = model._prepare_cache_for_generation

    def prepare_packed(
        generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        wanted = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if wanted not in (None, "dynamic"):
                raise QuantkitError(
                    f"cache_implementation={wanted!r}: this model's cache is packed INT4; leave it out"
                )
            generation_config.cache_implementation = None
            model_kwargs["past_key_values"] = packed_cache(model)
            return None
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    model._prepare_cache_for_generation = prepare_packed
