"""What a layer's attention is: its heads, and which factors on keys can be folded. Part of `discover`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from quantkit.models.groups import Attention, Heads
from quantkit.models.probe import TOKENS, Attended, ProbedLayer


def find_attention(probe: ProbedLayer, qkv: list[str], o: str, head_dim: int) -> Attention:
    """Heads and foldable factors of the attention between the linears `qkv` and the linear `o`."""
    attended = probe.run().attended
    if attended is None:
        heads = probe.constants[o].in_features // head_dim
        why = "its attention is not transformers' common one"
        path = o.rpartition(".")[0]
        return Attention(path, heads, heads, head_dim, why_no_factors=why, why_not_packed=why)
    path = probe.name_of(attended.module)
    norms = [name for name in ("q_norm", "k_norm") if f"{path}.{name}" in probe.norms]
    found = Attention(
        path,
        attended.query.shape[1],
        attended.key.shape[1],
        attended.key.shape[-1],
        len(norms) == 2,
    )
    if attended.softcap is not None:
        found = replace(found, why_not_packed="it caps attention scores")
    elif found.head_dim % 2:
        found = replace(found, why_not_packed=f"head_dim {found.head_dim} is odd")
    elif attended.value.shape != attended.key.shape:
        found = replace(found, why_not_packed="keys and values differ in size")
    return _with_factors(probe, qkv, o, found)


def _with_factors(probe: ProbedLayer, qkv: list[str], o: str, found: Attention) -> Attention:
    if found.key_norm:
        if _scaled_norms(probe, o, found):
            return found
        return replace(found, why_no_factors="its q_norm and k_norm cannot take them exactly")
    queries = _heads(probe, qkv, lambda attended: attended.query)
    keys = _heads(probe, qkv, lambda attended: attended.key)
    if queries is None or keys is None:
        return replace(found, why_no_factors="queries and keys are changed before RoPE")
    if not _pairs_turn(probe, o, found, queries, keys):
        return replace(found, why_no_factors="RoPE does not turn the halves of each head")
    return replace(found, queries=queries, keys=keys)


def _heads(probe: ProbedLayer, qkv: list[str], which: Any) -> Heads | None:
    """The rows that queries (or keys) come from: at position 0 RoPE turns nothing."""
    for name in qkv:
        constant = probe.constants[name]
        order = torch.randperm(constant.out_features, generator=torch.Generator().manual_seed(3))
        constant.output = (order + 1.0).repeat(TOKENS, 1)
        seen = which(probe.run().attended)[0, :, 0].float()
        probe.randomize()
        values = seen.round()
        if bool(((seen - values).abs() < 0.2).all()) and bool(
            ((values >= 1) & (values <= constant.out_features)).all()
        ):
            inverse = torch.zeros(constant.out_features + 1, dtype=torch.int64)
            inverse[order + 1] = torch.arange(constant.out_features)
            return Heads(name, inverse[values.long()])
    return None


def _pairs_turn(probe: ProbedLayer, o: str, found: Attention, queries: Heads, keys: Heads) -> bool:
    """Whether a factor that both members (i, i + head_dim / 2) share passes through RoPE unchanged."""
    a = torch.rand(found.kv_heads, found.head_dim // 2) + 0.5
    a = torch.cat([a, a], 1)
    # Keys that several heads read through one row need one factor: broadcast ones have it.
    shared: dict[int, float] = {}
    for row, value in zip(keys.rows.flatten().tolist(), a.flatten().tolist()):
        shared.setdefault(row, value)
    a = torch.tensor([shared[row] for row in keys.rows.flatten().tolist()]).view_as(a)
    base = probe.run()
    down = 1 / a.repeat_interleave(found.heads // found.kv_heads, 0)
    with (
        probe.scaled(keys.module, keys.rows.flatten(), a.flatten()),
        probe.scaled(queries.module, queries.rows.flatten(), down.flatten()),
    ):
        changed = probe.run()
    return _kept(base.attended, changed.attended, a, down) and _close(
        changed.inputs[o], base.inputs[o]
    )


def _scaled_norms(probe: ProbedLayer, o: str, found: Attention) -> bool:
    names = [f"{found.path}.q_norm", f"{found.path}.k_norm"]
    if any(probe.norms[name] for name in names):
        return False
    if any(probe.module(name).weight.numel() != found.head_dim for name in names):
        return False
    factor = torch.tensor([2.0, 0.5]).repeat(found.head_dim // 4 + 1)[: found.head_dim // 2]
    factor = torch.cat([factor, factor])
    base = probe.run()
    weights = [probe.module(name).weight for name in names]
    kept = [weight.clone() for weight in weights]
    weights[0].div_(factor)
    weights[1].mul_(factor)
    changed = probe.run()
    for weight, before in zip(weights, kept):
        weight.copy_(before)
    return _kept(base.attended, changed.attended, factor, 1 / factor) and _close(
        changed.inputs[o], base.inputs[o]
    )


def _kept(
    before: Attended | None, after: Attended | None, keys: torch.Tensor, queries: torch.Tensor
) -> bool:
    if before is None or after is None:
        return False
    return _close(after.key[0], before.key[0] * keys.unsqueeze(-2)) and _close(
        after.query[0], before.query[0] * queries.unsqueeze(-2)
    )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-4 * b.norm() + 1e-6)
