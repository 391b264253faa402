"""What the attention kernels take of a packed cache and a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kv4_append import typed_planes


class Packed(NamedTuple):
    """Keys or values.

    Attributes:
        codes: uint8 [B, H, S, D / 2], a head's tokens one after another.
        scales: their scales' bits, int16 (bf16) or uint8 (e4m3) [B, H, S].
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def words(self) -> torch.Tensor:
        """The codes as int16 [B, H, S, D / 4]."""
        return self.codes.view(torch.int16)


class Hidden(NamedTuple):
    """A mask: its kind (0: none, 1: bool as bytes, 2: additive) and its strides over batch, head, token."""

    mask: torch.Tensor | None
    kind: int
    strides: tuple[int, int, int]
    by_key: bool


def readable(cache: torch.Tensor, dim: int, planar: bool) -> Packed:
    """A cache in aligned rows.

    A vector followed by its scale is at an odd place: such a cache is copied, packed as it is, which is
    a fraction of what 2-byte loads would cost.
    """
    codes, scales = typed_planes(cache, dim, planar)
    batch, head, token = codes.stride()[:3]
    if token != dim // 2 or batch % 2 or head % 2 or codes.storage_offset() % 2:
        # Not `contiguous`, which leaves the stride of a dimension of one as it is.
        codes = codes.clone(memory_format=torch.contiguous_format)
        scales = scales.clone(memory_format=torch.contiguous_format)
    return Packed(codes, scales)


def hidden(mask: torch.Tensor | None, batch: int, heads: int, tokens: int) -> Hidden:
    """A mask [B or 1, 1 or H, T, S]; `by_key` where all heads and the one query see the same keys."""
    if mask is None:
        return Hidden(None, 0, (0, 0, 0), False)
    kind = 1 if mask.dtype == torch.bool else 2
    by_key = kind == 1 and tokens == 1 and mask.shape[1] == 1
    mask = mask if mask.stride(3) == 1 else mask.contiguous()
    mask = mask.expand(batch, heads, tokens, mask.shape[3])
    batch_stride, head, token, _ = mask.stride()
    strides = (batch_stride, head, token)
    return Hidden(mask.view(torch.uint8) if kind == 1 else mask, kind, strides, by_key)
