"""Attention over 16-bit keys and values in an emulated model: a prompt that comes whole attends as transformers' does.

vLLM's kernel for CPUs adds up in another order than torch's. INT4 activations turn such last bits into whole steps: on the
bundled Llama that alone moved log-probabilities by 0.22.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata


def attend_as_transformers(attention: Any) -> None:
    """Set it for one layer of vLLM's, where transformers uses torch's kernel."""
    impl = attention.impl
    if (
        type(impl) is CPUAttentionBackendImpl
        and impl.attn_type == AttentionType.DECODER
        and impl.alibi_slopes is None
        and impl.sinks is None
        and impl.kv_sharing_target_layer_name is None
        and not impl.logits_soft_cap
        and not impl.is_fp8_kv_cache
    ):
        impl.__class__ = _PromptsAsTransformers


class _PromptsAsTransformers(CPUAttentionBackendImpl):
    """vLLM's own but for whole prompts."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries [tokens, heads, D] of several sequences, one after the other, keys and values alike."""
        whole, others = self._whole_prompts(attn_metadata) if attn_metadata else ([], True)
        if others:
            super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        for rows in whole:
            q, k, v = (x[rows].transpose(0, 1)[None] for x in (query, key, value))
            attended = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )
            output[rows] = attended[0].transpose(0, 1)
        return output

    def _whole_prompts(self, batch: CPUAttentionMetadata) -> tuple[list[slice], bool]:
        """The rows of each whole prompt, and whether there is anything else in the batch."""
        if batch.causal is not True or batch.dynamic_causal is not None:
            return [], True
        starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        longest = self.sliding_window if self.sliding_window > 0 else max(lengths, default=0)
        whole = [
            slice(first, last)
            for first, last, length in zip(starts, starts[1:], lengths)
            if last - first == length and 1 < length <= longest
        ]
        return whole, len(whole) < len(lengths)
