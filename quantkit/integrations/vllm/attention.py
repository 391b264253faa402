"""Attention over INT4 keys and values in vLLM's paged cache: a block holds packed vectors, four bits a number.

vLLM's list of cache types is closed, but a backend may say how many bytes a token of a head takes
(`customize_spec`): here those of its packed key and value (`kernels.kv4`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from quantkit.errors import QuantkitError
from quantkit.formats.scheme import KVFormat
from quantkit.integrations.vllm.kernels import OLDEST_GPU, Platform, head_slice
from quantkit.kernels.kv4_attention import kv4_attention
from quantkit.runtime.attention import KVQuantizer

# A child of vLLM's logger: only those are shown.
logger = init_logger("vllm.quantkit")


@dataclass
class Sequences:
    """Sequences of a batch that are attended to together.

    Attributes:
        rows: of the queries that are theirs: of one sequence with any number of new tokens, or of several
            with one each.
        lengths: int64 [B], keys that each sees, the new ones among them.
        longest: the largest of them.
        blocks: int64 [B, n], the numbers of their blocks; what lies beyond a sequence's own is masked.
    """

    rows: torch.Tensor | slice
    lengths: torch.Tensor
    longest: int
    blocks: torch.Tensor


@dataclass
class PackedMetadata(AttentionMetadata):
    sequences: list[Sequences]


def group_sequences(
    starts: list[int], lengths: list[int], table: torch.Tensor, block_size: int
) -> list[Sequences]:
    """A batch in as few groups as waste no more than half of what they gather.

    Args:
        starts: first row of each sequence's new tokens, and the end of the last one's.
        lengths: keys that each sequence sees.
        table: int64 [sequences, n], the numbers of their blocks.
    """
    groups: list[Sequences] = []
    decoding: dict[int, list[int]] = {}
    for number, (first, last, length) in enumerate(zip(starts, starts[1:], lengths)):
        used = -(-length // block_size)
        if last - first == 1:
            decoding.setdefault(used.bit_length(), []).append(number)
        elif last > first:
            one = torch.tensor([length], device=table.device)
            groups.append(
                Sequences(slice(first, last), one, length, table[number : number + 1, :used])
            )
    for numbers in decoding.values():
        longest = max(lengths[n] for n in numbers)
        chosen = torch.tensor(numbers, device=table.device)
        rows = torch.tensor([starts[n] for n in numbers], device=table.device)
        each = torch.tensor([lengths[n] for n in numbers], device=table.device)
        groups.append(Sequences(rows, each, longest, table[chosen, : -(-longest // block_size)]))
    return groups


class PackedMetadataBuilder(AttentionMetadataBuilder[PackedMetadata]):
    """Reads a batch off vLLM's tables, once for all layers."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size: int = kv_cache_spec.block_size

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PackedMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise QuantkitError("INT4 keys and values are for causal attention alone")
        return PackedMetadata(
            group_sequences(
                batch.query_start_loc_cpu.tolist(),
                batch.seq_lens.tolist(),
                batch.block_table_tensor.long(),
                self.block_size,
            )
        )


class PackedImpl(AttentionImpl[PackedMetadata]):
    """What FireQ's attention does, on vLLM's blocks [blocks, KV heads, tokens, packed key | packed value].

    `quantizer` is set by `PackedKVMethod`.
    """

    quantizer: KVQuantizer

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.window = sliding_window or 0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        for given, what in (
            (alibi_slopes, "ALiBi slopes"),
            (logits_soft_cap, "capped scores"),
            (sinks, "attention sinks"),
        ):
            if given is not None and given is not False:
                raise QuantkitError(
                    f"this model has {what}, which attention over INT4 keys and values does not know: "
                    "quantize it with --set kv_cache=null, or serve it with --kv-cache-dtype bfloat16"
                )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write new keys [T, KV heads, D], after RoPE, and values into their slots."""
        tokens = len(slot_mapping)
        packed = self.quantizer.pack(
            *(x[:tokens].transpose(0, 1)[None] for x in (key, value))
        )  # each [1, KV heads, T, P]
        rows = torch.cat(packed, dim=-1)[0].transpose(0, 1)
        # Padding has slot -1: it goes to block 0, which vLLM keeps for nothing.
        slots = slot_mapping.long().clamp(min=0)
        size = kv_cache.shape[2]
        kv_cache[slots // size, :, slots % size] = rows

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PackedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, heads, D] -> output of that shape."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("outputs of packed attention are not quantized")
        if attn_metadata is None:  # warming up
            return output.zero_()
        for group in attn_metadata.sequences:
            output[group.rows] = self._attend(query[group.rows], kv_cache, group)
        return output

    def _attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, group: Sequences
    ) -> torch.Tensor:
        """The group's queries [T, heads, D] -> their outputs."""
        keys, values = self._gather(kv_cache, group)
        batch = len(group.lengths)
        one = batch == 1
        # One sequence's tokens are a dimension of their own; several sequences have one each.
        shaped = query.transpose(0, 1)[None] if one else query[:, :, None]
        out = kv4_attention(
            shaped,
            keys,
            values,
            None if one else self._mask(group),
            self.scale,
            one,
            self.quantizer.post_scale,
            self.quantizer.form.query == "fp8",
            None,
            self.window,
        )
        return out[0].transpose(0, 1) if one else out[:, :, 0]

    def _mask(self, group: Sequences) -> torch.Tensor:
        """bool [B, 1, 1, S]: the keys that are there, and in the window."""
        positions = torch.arange(group.longest, device=group.lengths.device)
        seen = positions < group.lengths[:, None]
        if self.window:
            seen &= positions >= group.lengths[:, None] - self.window
        return seen[:, None, None]

    def _gather(
        self, kv_cache: torch.Tensor, group: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed keys and values, each uint8 [B, KV heads, S, P]."""
        blocks = kv_cache[group.blocks].transpose(1, 2).flatten(2, 3)
        packed = blocks[:, :, : group.longest]
        size = self.quantizer.packed_size(self.head_size)
        return packed[..., :size], packed[..., size:]


class PackedBackend(AttentionBackend):
    """INT4 keys and values with a bf16 scale per token and head."""

    scale_bytes: ClassVar[int] = 2
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> type[PackedImpl]:
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type[PackedMetadataBuilder]:
        return PackedMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        if spec.state_content_bytes is not None:
            return spec
        vector = spec.head_size // 2 + cls.scale_bytes
        return replace(spec, dtype=torch.uint8, state_content_bytes=2 * vector)


class PackedBackendFP8(PackedBackend):
    """The same with scales in e4m3, one byte."""

    scale_bytes: ClassVar[int] = 1


class PackedKVMethod(BaseKVCacheMethod):
    """Puts packed attention in the place of the one that vLLM chose for a layer.

    vLLM chooses a backend for all models of a platform, and on a CPU has but one; which checkpoint a layer
    belongs to is known only here.
    """

    def __init__(self, config: Any, form: KVFormat, scales: dict[int, torch.Tensor]) -> None:
        super().__init__(config)
        self.form, self.scales = form, scales

    def create_weights(self, layer: torch.nn.Module) -> None:
        attention: Any = layer
        old = attention.impl
        backend = PackedBackend if self.form.scale == "bf16" else PackedBackendFP8
        attention.attn_backend = backend
        attention.backend = AttentionBackendEnum.CUSTOM
        attention.impl = PackedImpl(
            attention.num_heads,
            attention.head_size,
            old.scale,
            attention.num_kv_heads,
            getattr(old, "alibi_slopes", None),
            attention.sliding_window,
            attention.kv_cache_dtype,
            getattr(old, "logits_soft_cap", None) or None,
            attention.attn_type,
            old.kv_sharing_target_layer_name,
            getattr(old, "sinks", None),
        )
        scale = self._share(attention)
        quantizer = KVQuantizer(self.form, scale)
        attention.impl.quantizer = quantizer.to(torch.empty(0).device)

    def _share(self, attention: Any) -> torch.Tensor | None:
        """This rank's rows of the layer's factor [KV heads, head_dim], or None where it has none."""
        scale = self.scales.get(extract_layer_index(attention.layer_name))
        if scale is None:
            if self.scales:
                raise QuantkitError(
                    f"quantkit/kv.safetensors holds nothing for {attention.layer_name}; "
                    "the checkpoint is not complete: copy or quantize it again"
                )
            return None
        first, last = head_slice(
            len(scale),
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
            attention.num_kv_heads,
        )
        return scale[first:last].contiguous()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: the scales came from quantkit/kv.safetensors."""


def refuse_or_take(attention: Any, form: KVFormat, platform: Platform) -> bool:
    """Whether a layer's keys and values go into an INT4 cache; a line in the log says what happens to them."""
    if attention.attn_type != AttentionType.DECODER:
        return False
    if attention.kv_cache_dtype != "auto":
        logger.info_once(
            "quantkit: keys and values as --kv-cache-dtype %s says, not in INT4",
            attention.kv_cache_dtype,
        )
        return False
    if platform.device == "cpu":
        logger.info_once(
            "quantkit: INT%d keys and values, packed: EMULATED on the CPU, the numbers of this format, "
            "no claim about its speed",
            form.bits,
        )
        return True
    if platform.device == "cuda" and (platform.capability or 0) >= OLDEST_GPU:
        logger.info_once(
            "quantkit: INT%d keys and values, packed, by quantkit's Triton kernel", form.bits
        )
        return True
    logger.warning_once("quantkit: keys and values in 16 bits on this device, not in INT4")
    return False
