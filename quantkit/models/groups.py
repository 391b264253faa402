"""The parts of a decoder layer that quantization works on: which linears share an input, and what feeds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# What recipes call the inputs of a layer's linears.
Place = Literal["qkv", "o", "gate_up", "down"]
PLACES: tuple[Place, ...] = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, eq=False)
class Feeder:
    """Where a factor per input channel of a group can go: its inverse scales this module's outputs.

    Attributes:
        module: name within the layer.
        norm: whether it is a norm (its weight is divided), else a linear (its rows are).
        offset: a norm multiplies by weight + offset: 1 in Gemma's.
        rows: of a linear, int64 [K]: the row that each input channel comes from. Query heads that share a
            KV head come from the same rows of v_proj, and can only have one factor.
    """

    module: str
    norm: bool
    offset: float = 0.0
    rows: torch.Tensor | None = None

    def shared(self, d: torch.Tensor) -> torch.Tensor:
        """A factor [K] made equal for the channels that come from one row: the largest of theirs."""
        if self.rows is None:
            return d
        rows = self.rows.to(d.device)
        largest = d.new_zeros(int(rows.max()) + 1).scatter_reduce(0, rows, d, "amax")
        return largest[rows]


@dataclass(frozen=True, eq=False)
class InputGroup:
    """Linears of a decoder layer that read the same input.

    Attributes:
        name: unique in the layer; the place itself but in mixtures of experts.
        place: what recipes call this input.
        linears: module names within the layer.
        feeder: where a factor of the input can go, or None if nothing can take it.
        others: modules that read the input too and are never quantized (a router): a factor multiplies
            their columns as well.
        parts: groups of the same linears whose inputs are some tokens of this one each (experts).
        why_not: why no factor can be folded, if there is no feeder.
    """

    name: str
    place: Place
    linears: tuple[str, ...]
    feeder: Feeder | None
    others: tuple[str, ...] = ()
    parts: tuple[InputGroup, ...] = ()
    why_not: str = ""

    @property
    def watched(self) -> str:
        """The module whose input is this group's, all tokens of it."""
        partial = {name for part in self.parts for name in part.linears}
        return next(name for name in self.linears + self.others if name not in partial)


@dataclass(frozen=True, eq=False)
class Heads:
    """Where queries or keys come from: rows int64 [heads, head_dim] of a linear's outputs."""

    module: str
    rows: torch.Tensor


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention of a layer.

    Attributes:
        path: name within the layer.
        key_norm: whether queries and keys are normalised per head (q_norm, k_norm).
        queries, keys: where they come from, when factors on keys before RoPE can be folded; else None.
        why_no_factors: why not, in a few words.
        why_not_packed: why keys and values cannot be kept in four bits, or nothing if they can.
    """

    path: str
    heads: int
    kv_heads: int
    head_dim: int
    key_norm: bool = False
    queries: Heads | None = None
    keys: Heads | None = None
    why_no_factors: str = ""
    why_not_packed: str = ""


@dataclass(frozen=True, eq=False)
class LayerStructure:
    """One decoder layer.

    Attributes:
        groups: in the order in which data flows.
        shapes: linear's name within the layer -> (out, in).
        fused: sets of linears that servers fuse into one matrix: they need one scheme.
        mlp: name within the layer.
    """

    groups: tuple[InputGroup, ...]
    shapes: dict[str, tuple[int, int]]
    fused: tuple[tuple[str, ...], ...]
    attention: Attention
    mlp: str

    @property
    def inputs(self) -> tuple[InputGroup, ...]:
        """Every input of which statistics are kept: the groups and their parts."""
        return tuple(each for group in self.groups for each in (group, *group.parts))

    def place(self, place: Place) -> tuple[InputGroup, ...]:
        """The groups of one place."""
        return tuple(group for group in self.groups if group.place == place)
