"""Transforms of a decoder layer that leave its function as it is: factors folded from one weight into another.

Everywhere, a factor d divides an activation's channels and multiplies the columns of the weights that read it.
Weights are changed in place and are expected in float32 (tests use float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.models.structure import InputGroup, Structure


def share_over_query_heads(d: torch.Tensor, structure: Structure) -> torch.Tensor:
    """A factor [heads * head_dim] of o_proj's input, made equal for the query heads that share a KV head.

    v_proj has one row for all of them, so only such a factor can be folded into it. Takes the largest.
    """
    heads = d.view(structure.kv_heads, -1, structure.head_dim)
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)


@torch.no_grad()
def fold_factor(
    layer: nn.Module,
    group: InputGroup,
    d: torch.Tensor,
    structure: Structure,
    norm_dtype: torch.dtype,
) -> torch.Tensor:
    """Divide a group's input by d in what feeds it, multiply the columns of its linears by d.

    Args:
        d: [K], positive.
        norm_dtype: the type norms are stored in. The factor that a norm can take is bounded by its rounding:
            the one that it takes exactly is used, so nothing of the function is lost.

    Returns:
        The factor that was applied.
    """
    feeder: Any = layer.get_submodule(group.feeder)
    if group.feeder_is_norm:
        stored = (feeder.weight / d).to(norm_dtype).to(feeder.weight.dtype)
        usable = (stored != 0) & torch.isfinite(stored)
        d = torch.where(usable, feeder.weight / stored, torch.ones_like(d))
        feeder.weight.copy_(torch.where(usable, stored, feeder.weight))
    else:
        rows = d
        if group.name == "o":
            rows = d.view(structure.kv_heads, -1, structure.head_dim)[:, 0].reshape(-1)
        feeder.weight.div_(rows[:, None])
        if feeder.bias is not None:
            feeder.bias.div_(rows)
    for name in group.linears:
        linear: Any = layer.get_submodule(name)
        linear.weight.mul_(d[None, :])
    return d


@torch.no_grad()
def fold_rope_factor(layer: nn.Module, a: torch.Tensor, structure: Structure) -> torch.Tensor:
    """Multiply keys by a before RoPE and divide queries by it (FireQ's pre-RoPE scaling).

    Args:
        a: [KV heads, head_dim], equal on both members of each RoPE pair.

    Returns:
        The factor that was applied: a itself, or, where queries and keys are normalised per head, the
        power of two that suits all heads, since q_norm and k_norm have one weight for all.
    """
    attention: Any = layer.get_submodule("self_attn")
    if structure.key_norm:
        shared = torch.exp2(torch.floor(torch.log2(a.amin(0))))
        attention.k_norm.weight.mul_(shared)
        attention.q_norm.weight.div_(shared)
        return shared.expand_as(a)
    for projection, factor in (
        (attention.k_proj, a.reshape(-1)),
        (
            attention.q_proj,
            1 / a.repeat_interleave(structure.heads // structure.kv_heads, 0).reshape(-1),
        ),
    ):
        projection.weight.mul_(factor[:, None])
        if projection.bias is not None:
            projection.bias.mul_(factor)
    return a
