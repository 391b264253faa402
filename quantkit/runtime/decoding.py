"""Greedy decoding step by step in one loop for every model; on a GPU a step is one CUDA graph."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, StaticCache

from quantkit.runtime.cache import packed_cache, quantizers

_LOG = logging.getLogger("quantkit")
_WARM_UP = 3


class Decoder:
    """Decodes a batch of sequences of equal length, always the likeliest token.

    On a GPU the cache has a fixed size and a step is recorded once and replayed, so that no time of the
    host's passes between kernels; on a CPU the cache grows. It grows as well where layers see a window
    only: their caches count on the host, which a graph does not repeat.

    Args:
        model: from `quantkit.load`, quantized or not.
        batch: sequences.
        length: the most tokens of one, prompt and answer.
        fixed: whether the cache has a fixed size; left out: as said above.
    """

    def __init__(self, model: Any, batch: int, length: int, fixed: bool | None = None) -> None:
        self.model, self.batch, self.length = model, batch, length
        self.device: torch.device = model.device
        on_gpu = self.device.type == "cuda"
        self._fixed = (on_gpu if fixed is None else fixed) and not self._has_windows()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded = False
        self._cache: Any = None
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self._position = torch.zeros(1, 1, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Begin anew with a prompt [batch, T]; returns the next tokens [batch, 1].

        Raises:
            ValueError: the prompt does not fit.
        """
        if ids.shape[0] != self.batch or ids.shape[1] >= self.length:
            raise ValueError(
                f"a prompt {tuple(ids.shape)} for {self.batch} sequences of at most {self.length}"
            )
        if self._cache is None or not self._fixed:
            self._cache = self._new_cache()
        else:
            self._cache.reset()
        out = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._tokens.copy_(out.logits[:, -1:].argmax(-1))
        self._position.fill_(ids.shape[1])
        return self._tokens

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """The next tokens [batch, 1] (int64, overwritten by the step after)."""
        if self._fixed and self.device.type == "cuda" and not self._recorded:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._forward()
        return self._tokens

    def _new_cache(self) -> Any:
        if quantizers(self.model):
            return packed_cache(self.model, self.length if self._fixed else None)
        if self._fixed:
            return StaticCache(self._config, max_cache_len=self.length)
        return DynamicCache(config=self._config)

    @property
    def _config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    def _has_windows(self) -> bool:
        return any(layer.is_sliding for layer in StaticCache(self._config, max_cache_len=1).layers)

    def _forward(self) -> None:
        mask = None
        if self._fixed:
            # Beyond the last token a cache of fixed size is empty.
            slots = torch.arange(self._slots, device=self.device)
            mask = (slots <= self._position).view(1, 1, 1, -1).expand(self.batch, -1, -1, -1)
        out = self.model(
            self._tokens,
            position_ids=self._position.expand(self.batch, 1),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._tokens.copy_(out.logits[:, -1:].argmax(-1))
        self._position.add_(1)

    @property
    def _slots(self) -> int:
        return int(self._cache.layers[0].max_cache_len)

    def _record(self) -> None:
        """One step as a graph; the state is as before. Where a model cannot be recorded, steps run as they are."""
        self._recorded = True
        state = (self._tokens, self._position, *self._lengths())
        before = [t.clone() for t in state]
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._forward()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    self._forward()
            self._graph = graph
        except RuntimeError as error:
            _LOG.warning("no CUDA graph of a step could be recorded: %s", error)
        torch.cuda.synchronize()
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)

    def _lengths(self) -> list[torch.Tensor]:
        """How many tokens each layer of a fixed cache holds: what warming up changes, beside slots not yet used."""
        return [layer.cumulative_length for layer in self._cache.layers]
