"""The cases of attention over the INT4 cache, and of appending to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from quantkit.bench.case import Case
from quantkit.bench.timing import Run, copies
from quantkit.kernels.kv4 import kv4_quantize, planes
from quantkit.kernels.kv4_append import kv4_append, rotate
from quantkit.kernels.kv4_attention import kv4_attention

CONTEXTS = (512, 4096, 32768)
# Llama-3-8B's.
HEADS, KV_HEADS, DIM = 32, 8, 128
_BLOCK = 1024  # queries of a chunk of a prompt


def _caches(
    batch: int, context: int, device: torch.device
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """([packed keys, packed values], ...), ([keys, values] in bf16, ...), as often as caches ask for."""
    elements = batch * KV_HEADS * context * DIM
    wide = [
        [torch.randn(batch, KV_HEADS, context, DIM, device=device).bfloat16() for _ in range(2)]
        for _ in range(copies(4 * elements, device))
    ]
    first = [_laid_out(kv4_quantize(t)) for t in wide[0]]
    packed = [[t.clone() for t in first] for _ in range(copies(elements, device))]
    return packed, wide


def _planar(device: torch.device) -> bool:
    """A static cache's layout, which a GPU reads in words."""
    return device.type == "cuda"


def _laid_out(packed: torch.Tensor) -> torch.Tensor:
    if not _planar(packed.device):
        return packed
    cache = torch.empty_like(packed)
    for plane, part in zip(
        planes(cache, DIM, True), packed.split((DIM // 2, packed.shape[-1] - DIM // 2), dim=-1)
    ):
        plane.copy_(part)
    return cache


def _attend(op: str, batch: int, context: int, tokens: int, device: torch.device) -> Case:
    packed, wide = _caches(batch, context, device)
    query = torch.randn(batch, HEADS, tokens, DIM, device=device).bfloat16()
    causal, scaling = tokens > 1, DIM**-0.5
    # torch's own causal mask aligns the first query with the first key.
    mask = None
    if 1 < tokens < context:
        mask = torch.ones(tokens, context, dtype=torch.bool, device=device).tril(context - tokens)

    @torch.inference_mode()
    def ours(i: int) -> object:
        keys, values = packed[i % len(packed)]
        return kv4_attention(query, keys, values, None, scaling, causal, planar=_planar(device))

    @torch.inference_mode()
    def theirs(i: int) -> object:
        keys, values = wide[i % len(wide)]
        return F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=causal and mask is None, enable_gqa=True
        )

    pairs = batch * HEADS * tokens * (context - (tokens - 1) / 2)
    size = 2 * packed[0][0].numel() + 4 * query.numel()
    runs: dict[str, Run] = {"quantkit": ours, "bf16": theirs}
    queries = "decode" if tokens == 1 else f"prompt of {tokens}"
    return Case(op, f"{queries}, batch {batch}", context, runs, size, 4 * DIM * pairs, "bf16")


def _decode(op: str, batch: int, context: int, device: torch.device) -> Case:
    return _attend(op, batch, context, 1, device)


def _prefill(op: str, batch: int, context: int, device: torch.device) -> Case:
    return _attend(op, batch, context, min(context, _BLOCK), device)


def _append(op: str, batch: int, context: int, device: torch.device) -> Case:
    """`context` new tokens into an empty cache; beside RoPE and copying in torch."""
    shape = (batch, KV_HEADS, context, DIM)
    query = torch.randn(batch, HEADS, context, DIM, device=device).bfloat16()
    key, value = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    angles = torch.rand(1, context, DIM, device=device) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    positions = torch.arange(context, device=device)
    count = copies(3 * key.numel(), device)
    caches = [
        [torch.empty(*shape[:3], DIM // 2 + 2, dtype=torch.uint8, device=device) for _ in range(2)]
        for _ in range(count)
    ]
    wide = [[torch.empty_like(key) for _ in range(2)] for _ in range(count)]

    @torch.inference_mode()
    def ours(i: int) -> object:
        return kv4_append(
            query, key, value, cos, sin, *caches[i % count], positions, planar=_planar(device)
        )

    @torch.inference_mode()
    def theirs(i: int) -> object:
        keys, values = wide[i % count]
        keys.index_copy_(2, positions, rotate(key, cos, sin))
        values.index_copy_(2, positions, value)
        return rotate(query, cos, sin)

    size = 4 * query.numel() + 4 * key.numel() + 2 * caches[0][0].numel()
    runs: dict[str, Run] = {"quantkit": ours, "bf16": theirs}
    return Case(op, f"batch {batch}", context, runs, size, 0.0, "bf16")


Maker = Callable[[str, int, int, torch.device], Case]
OPS: Mapping[str, tuple[Maker, ...]] = {
    "kv4_attention": (_decode, _prefill),
    "kv4_append": (_append,),
}
