"""Rotations moved into the weights: the model computes what it did, in a basis that has no outliers.

Two of them cost nothing at run time (QuaRot, arXiv 2404.00456, section 4, after SliceGPT's observation that an
RMS norm without a weight commutes with any rotation):

    residual stream   norms' weights go into the linears behind, then  E R,  W_in R,  R^T W_out,  W_head R
    values            each head's value is rotated, o_proj's columns to match:  R_h^T W_v,  W_o R_h

A weight [out, in] that reads a rotated input has its columns rotated, one that writes it its rows and its bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint, TensorInfo
from quantkit.methods.hadamard import random_signs, rotate, widest_block
from quantkit.models.groups import Feeder, InputGroup, LayerStructure
from quantkit.models.probe import norm_offset
from quantkit.models.structure import Structure

# Rows of an embedding or head that are rotated at a time.
_ROWS = 8192
_RESIDUAL_CHILDREN = {"embed_tokens", "layers", "norm", "rotary_emb"}


@dataclass(frozen=True)
class ResidualBasis:
    """The basis that the residual stream is turned into: x -> (x * signs) R.

    Attributes:
        width: of the residual stream.
        block: of the rotation R; divides the width.
        seed: of the signs. Without them the first channel would collect the mean of each block.
        embedding, norm, head: names of the modules outside the layers that take part.
        tied: whether the source's head is its embedding.
    """

    width: int
    block: int
    seed: int
    embedding: str
    norm: str
    head: str
    tied: bool

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] in the new basis, in float32 (float64 for float64)."""
        return rotate(x * random_signs(self.width, self.seed).to(x), self.block)

    @torch.no_grad()
    def turn_layer(self, layer: nn.Module, structure: LayerStructure) -> None:
        """A decoder layer, in place: norms' weights into the linears behind, which become 1, and all weights turned."""
        for group in structure.groups:
            for name in (*group.linears, *group.others):
                linear: Any = layer.get_submodule(name)
                if group.place in ("qkv", "gate_up"):
                    norm: Any = layer.get_submodule(_norm_of(group) or "")
                    linear.weight.copy_(self.turn(linear.weight * norm.weight))
                    continue
                linear.weight.copy_(self.turn(linear.weight.T).T)
                if linear.bias is not None:
                    linear.bias.copy_(self.turn(linear.bias))
        for group in structure.groups:
            if group.place in ("qkv", "gate_up"):
                norm = layer.get_submodule(_norm_of(group) or "")
                norm.weight.fill_(1.0)

    def turn_rows(
        self, weight: torch.Tensor, norm_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows of an embedding or head [rows, width] in the new basis, in its own type.

        Args:
            norm_weight: [width], the weight of the final norm, which goes into the head.
        """
        rows = weight if weight.dtype == torch.float64 else weight.float()
        if norm_weight is not None:
            rows = rows * norm_weight.to(rows)
        return self.turn(rows).to(weight.dtype)

    @property
    def outside(self) -> set[str]:
        """The tensors outside the layers that change; where the source's head is tied, the head is a new one."""
        return {f"{module}.weight" for module in (self.embedding, self.norm, self.head)}

    def turn_outside(self, source: Checkpoint) -> Iterator[TurnedTensor]:
        """All of `outside`, one after the other, in pieces, from the source's tensors.

        A tied head is written on its own: the final norm's weight belongs to it and not to the embedding.

        Raises:
            QuantkitError: a tensor is missing, or holds NaN or infinity.
        """
        norm = source.read(f"{self.norm}.weight", finite=True)

        def pieces(name: str, norm_weight: torch.Tensor | None) -> Iterator[torch.Tensor]:
            rows = source.tensors[name].shape[0]
            for first in range(0, rows, _ROWS):
                span = (first, min(first + _ROWS, rows))
                yield self.turn_rows(source.read(name, rows=span, finite=True), norm_weight)

        embedding = f"{self.embedding}.weight"
        yield TurnedTensor(embedding, source.tensors[embedding], pieces(embedding, None))
        head = embedding if self.tied else f"{self.head}.weight"
        yield TurnedTensor(f"{self.head}.weight", source.tensors[head], pieces(head, norm))
        final = f"{self.norm}.weight"
        yield TurnedTensor(final, source.tensors[final], iter([torch.ones_like(norm)]))


@dataclass(frozen=True)
class TurnedTensor:
    """A tensor of the output, piece by piece along its rows; `like` has its type and shape."""

    name: str
    like: TensorInfo
    pieces: Iterator[torch.Tensor]


def residual_basis(
    model: nn.Module, structure: Structure, where: str, seed: int = 0
) -> ResidualBasis:
    """The new basis of a model built by `build_skeleton`: one block as wide as the stream, where there is one.

    Raises:
        QuantkitError: something other than embedding, layers and a plain final norm touches the residual stream.
    """
    base: Any = model.get_submodule(structure.layers.rpartition(".")[0])
    names: dict[int, str] = {id(m): n for n, m in model.named_modules()}
    found: Any = model
    embedding, head = found.get_input_embeddings(), found.get_output_embeddings()
    others = {n for n, _ in base.named_children()} - _RESIDUAL_CHILDREN
    norm = getattr(base, "norm", None)
    blocks: Any = model.get_submodule(structure.layers)
    plain = all(_is_plain(blocks[n], layer) for n, layer in enumerate(structure.layer_structures))
    if others or norm is None or not _is_rms_norm(norm) or type(head) is not nn.Linear or not plain:
        raise QuantkitError(
            f"{where}: rotation.residual needs embedding, layers, a plain RMS norm and a linear head; this "
            f"{structure.architecture} is built otherwise"
        )
    width = int(embedding.weight.shape[1])
    return ResidualBasis(
        width=width,
        block=widest_block(width),
        seed=seed,
        embedding=names[id(embedding)],
        norm=names[id(norm)],
        head=names[id(head)],
        tied=bool(getattr(found.config, "tie_word_embeddings", False)),
    )


def _norm_of(group: InputGroup) -> str | None:
    """The norm whose output a group reads, if its weight can go into what reads it."""
    feeder = group.feeder
    return feeder.module if feeder is not None and feeder.norm and not feeder.offset else None


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether norm(x) = weight * x / rms(x), found by trying it: a layer norm would make nothing of a constant."""
    parameters = dict(norm.named_parameters())
    if norm_offset(norm) != 0 or set(parameters) != {"weight"}:
        return False
    ones = torch.ones(parameters["weight"].shape)
    got: torch.Tensor = torch.func.functional_call(norm, {"weight": ones}, (ones[None],))
    return bool((got - 1).abs().max() < 0.01)


def _is_plain(layer: nn.Module, structure: LayerStructure) -> bool:
    """Whether a layer is `x + attention(norm(x))`, then `x + mlp(norm(x))`, with plain RMS norms and no mixture."""
    norms = {_norm_of(g) for g in structure.groups if g.place in ("qkv", "gate_up")}
    children = {n for n, m in layer.named_children() if not isinstance(m, nn.Dropout)}
    return (
        len(structure.groups) == 4
        and None not in norms
        and len(norms) == 2
        and children == {structure.attention.path, structure.mlp, *norms}
        and all(_is_rms_norm(layer.get_submodule(name or "")) for name in norms)
    )


def value_block(structure: LayerStructure) -> int:
    """The block by which value heads are rotated: a whole head, where a Hadamard matrix of its size is known."""
    return widest_block(structure.attention.head_dim)


def check_values(structure: Structure, where: str) -> None:
    """Raise QuantkitError where value heads cannot be rotated in the weights."""
    for layer in structure.kinds:
        try:
            _value_heads(layer)
        except LookupError as error:
            raise QuantkitError(f"{where}: rotation.values: {error}") from None


def turned_tensors(structure: Structure, basis: ResidualBasis | None, values: bool) -> set[str]:
    """Full names of the tensors that rotations change, quantized or not."""
    names = set(basis.outside) if basis else set()
    for number, layer in enumerate(structure.layer_structures):
        changed = set(layer.shapes) if basis else set()
        if values:
            changed |= {_value_heads(layer)[0].module, layer.place("o")[0].linears[0]}
        names |= {f"{structure.prefix(number)}{linear}.weight" for linear in changed}
    return names


def _value_heads(structure: LayerStructure) -> tuple[Feeder, torch.Tensor]:
    """(what o_proj's input comes from, its rows int64 [KV heads, head_dim]).

    Raises:
        LookupError: o_proj's input is not made of whole value heads.
    """
    groups, attention = structure.place("o"), structure.attention
    feeder = groups[0].feeder if len(groups) == 1 else None
    if feeder is None or feeder.rows is None:
        raise LookupError("the input of o does not come from value heads alone")
    if feeder.rows.numel() != attention.heads * attention.head_dim:
        raise LookupError("value heads are of another size than the others")
    heads = feeder.rows.view(attention.heads, attention.head_dim).unique(dim=0)
    if heads.numel() != heads.unique().numel():
        raise LookupError("value heads share rows")
    return feeder, heads


@torch.no_grad()
def turn_values(layer: nn.Module, structure: LayerStructure, block: int) -> None:
    """Rotate each value head and what o_proj reads of it, in place.

    Args:
        block: of the rotation; divides head_dim, so that no block reaches over two heads, and query heads that
            share a KV head read the same rotated values.

    Raises:
        ValueError: block does not divide head_dim.
    """
    head_dim = structure.attention.head_dim
    if head_dim % block:
        raise ValueError(f"head_dim {head_dim} does not divide into blocks of {block}")
    feeder, heads = _value_heads(structure)
    v: Any = layer.get_submodule(feeder.module)
    o: Any = layer.get_submodule(structure.place("o")[0].linears[0])
    rows = heads.flatten().to(v.weight.device)
    v.weight[rows] = rotate(v.weight[rows].T, block).T
    if v.bias is not None:
        v.bias[rows] = rotate(v.bias[rows], block)
    o.weight.copy_(rotate(o.weight, block))
