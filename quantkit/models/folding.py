"""Transforms of a decoder layer that leave its function as it is: factors folded from one weight into another.

Everywhere, a factor d divides an activation's channels and multiplies the columns of the weights that read it.
Weights are changed in place and are expected in float32 (tests use float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.models.groups import Attention, InputGroup
from quantkit.models.structure import Structure


def may_change(structure: Structure) -> set[str]:
    """Full names of the tensors that stay in 16 bits and may have taken a factor in: norms, biases, routers."""
    names: set[str] = set()
    for number, layer in enumerate(structure.layer_structures):
        prefix, attention = structure.prefix(number), layer.attention
        changed = {f"{linear}.bias" for linear in layer.shapes}
        for group in layer.groups:
            changed |= {f"{name}.weight" for name in group.others}
            if group.feeder is not None and group.feeder.norm:
                changed |= {f"{group.feeder.module}.weight", f"{group.feeder.module}.bias"}
        for heads in (attention.queries, attention.keys):
            # Where they stay in 16 bits: factors on keys go into them.
            changed |= {f"{heads.module}.weight"} if heads else set()
        if attention.key_norm:
            changed |= {f"{attention.path}.q_norm.weight", f"{attention.path}.k_norm.weight"}
        names |= {prefix + name for name in changed}
    return names


@torch.no_grad()
def fold_factor(
    layer: nn.Module, group: InputGroup, d: torch.Tensor, norm_dtype: torch.dtype
) -> torch.Tensor:
    """Divide a group's input by d in what feeds it, multiply the columns of what reads it by d.

    Args:
        group: it has a feeder.
        d: [K], positive; equal for channels that come from one row of a linear feeder (`Feeder.shared`).
        norm_dtype: the type norms are stored in. The factor that a norm can take is bounded by its rounding:
            the one that it takes exactly is used, so nothing of the function is lost.

    Returns:
        The factor that was applied.
    """
    assert group.feeder is not None
    feeder: Any = layer.get_submodule(group.feeder.module)
    if group.feeder.norm:
        d = _fold_into_norm(feeder, group.feeder.offset, d, norm_dtype)
    else:
        assert group.feeder.rows is not None
        rows = torch.ones_like(feeder.weight[:, 0])
        rows[group.feeder.rows.to(rows.device)] = d.to(rows.dtype)
        feeder.weight.div_(rows[:, None])
        if feeder.bias is not None:
            feeder.bias.div_(rows)
    for name in group.linears + group.others:
        reader: Any = layer.get_submodule(name)
        reader.weight.mul_(d[None, :])
    return d


def _fold_into_norm(
    norm: Any, offset: float, d: torch.Tensor, norm_dtype: torch.dtype
) -> torch.Tensor:
    """Divide a norm's outputs by d where its stored weight can say so; returns the factor that it took."""
    scale = norm.weight + offset
    stored = (scale / d - offset).to(norm_dtype).to(norm.weight.dtype)
    left = stored + offset
    usable = (left != 0) & torch.isfinite(left) & (scale != 0)
    d = torch.where(usable, scale / left, torch.ones_like(d))
    norm.weight.copy_(torch.where(usable, stored, norm.weight))
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(d)
    return d


@torch.no_grad()
def fold_rope_factor(layer: nn.Module, a: torch.Tensor, shape: Attention) -> torch.Tensor:
    """Multiply keys by a before RoPE and divide queries by it (FireQ's pre-RoPE scaling).

    Args:
        a: [KV heads, head_dim], equal on both members of each RoPE pair.
        shape: of the layer's attention, which can take such factors.

    Returns:
        The factor that was applied: a itself, or, where queries and keys are normalised per head, the
        power of two that suits all heads, since q_norm and k_norm have one weight for all.
    """
    if shape.key_norm:
        attention: Any = layer.get_submodule(shape.path)
        shared = torch.exp2(torch.floor(torch.log2(a.amin(0))))
        attention.k_norm.weight.mul_(shared)
        attention.q_norm.weight.div_(shared)
        return shared.expand_as(a)
    assert shape.keys is not None
    assert shape.queries is not None
    down = 1 / a.repeat_interleave(shape.heads // shape.kv_heads, 0)
    for heads, factor in ((shape.keys, a), (shape.queries, down)):
        projection: Any = layer.get_submodule(heads.module)
        rows = heads.rows.flatten().to(factor.device)
        projection.weight[rows] *= factor.reshape(-1)[:, None]
        if projection.bias is not None:
            projection.bias[rows] *= factor.reshape(-1)
    return a
