"""The INT4 layout of torch's native CPU product, and the way back from it.

`aten::_weight_int4pack_mm_for_cpu` reads a layout that depends on the CPU: blocks of rows (64 with
AVX-512, 32 with AVX2), inside a block [K, rows / 2] bytes, each holding two rows' nibbles of one
column. Where each nibble lies is found once, by packing patterns that spell out their own row and
column; then `unpack` inverts `repack` exactly, and one packed copy in memory serves both decode
(the native product) and prefill (which expands it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .cpu import linear
from .packing import unpack_int4

GROUP_SIZES = (256, 128, 64, 32)  # that the native product knows
ROW_MULTIPLE = 16
_PROBE_COLUMNS = 64
_PROBE_ROWS = 512


@dataclass(frozen=True)
class _Block:
    """`rows` rows in [K, rows / 2] bytes: row r is nibble `order[r]`, all low nibbles first."""

    rows: int
    order: torch.Tensor  # int64 [rows]


def repack(
    weight: torch.Tensor, scale: torch.Tensor, half: bool = False
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The stored layout -> the native CPU layout, or None where it cannot be had.

    Args:
        weight: int32 [N, K / 8], as stored (`pack_int4`).
        scale: [N, G], one scale per group of K / G inputs; G = 1 is per channel.
        half: the grid is (q + 1/2) * scale instead of q * scale.

    Returns:
        uint8 [N, K / 2] and scales-and-zeros [G', N, 2] in scale's dtype: the value is
        (u - 8) * s + z with z = s / 2 or 0. G' may exceed G, since large groups are split into ones
        that the native op knows. None if N is no multiple of 16, the group size none of 32, or
        this machine's layout is not understood: keep the stored layout then.
    """
    n, k = weight.shape[0], weight.shape[1] * 8
    group = k // scale.shape[1]
    native = next((size for size in GROUP_SIZES if group % size == 0), None)
    if n % ROW_MULTIPLE or native is None or weight.device.type != "cpu" or not supported():
        return None
    packed = linear.pack_int4(weight)
    if packed is None:
        unsigned = unpack_int4(weight).add_(8).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    scales = scale.t().repeat_interleave(group // native, dim=0)
    zeros = scales / 2 if half else torch.zeros_like(scales)
    return packed, torch.stack((scales, zeros), dim=-1).contiguous()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K / 2] in the native CPU layout -> int8 [N, K], values -8..7."""
    n, k = packed.shape[0], packed.shape[1] * 2
    codes = torch.empty(n, k, dtype=torch.int8)
    flat = packed.reshape(-1)
    for start, block in row_blocks(n):
        stop = n if block.rows != _full_block().rows else n - n % block.rows
        bytes_ = flat[start * k // 2 : stop * k // 2].view(-1, k, block.rows // 2)
        nibbles = torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1).view(torch.int8).sub_(8)
        by_nibble = nibbles.transpose(1, 2).contiguous()
        torch.index_select(by_nibble, 1, block.order, out=codes[start:stop].view(-1, block.rows, k))
    return codes


def row_blocks(n: int) -> list[tuple[int, _Block]]:
    """The (first row, kind) of the full blocks together and of the partial one after them."""
    full = _full_block()
    rest = n % full.rows
    blocks = [(0, full)] if n > rest else []
    return [*blocks, (n - rest, _probe(rest, rest))] if rest else blocks


@lru_cache(maxsize=1)
def supported() -> bool:
    """Whether this machine's layout was understood, and verified on random codes."""
    try:
        full = _full_block()
        rows = 2 * full.rows + ROW_MULTIPLE
        generator = torch.Generator().manual_seed(0)
        unsigned = torch.randint(0, 16, (rows, 96), dtype=torch.int32, generator=generator)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        return bool(torch.equal(unpack(packed).int() + 8, unsigned))
    except (RuntimeError, LookupError, AttributeError):
        return False


@lru_cache(maxsize=1)
def _full_block() -> _Block:
    for rows in (16, 32, 64, 128, 256):
        try:
            return _probe(rows, _PROBE_ROWS)
        except LookupError:
            continue
    raise LookupError("the int4pack layout has no block of rows that is known")


@lru_cache(maxsize=32)
def _probe(rows: int, probe_rows: int) -> _Block:
    """Read the layout of blocks of `rows` rows off a packed matrix of `probe_rows` rows.

    Raises:
        LookupError: the packed matrix is not made of such blocks.
    """
    row = torch.arange(probe_rows, dtype=torch.int32)[:, None].expand(-1, _PROBE_COLUMNS)
    column = torch.arange(_PROBE_COLUMNS, dtype=torch.int32).expand(probe_rows, -1)

    def where(value: torch.Tensor) -> torch.Tensor:
        """What `value` [rows, columns] is at each nibble [blocks, columns, 2 * bytes]."""
        found = torch.zeros(probe_rows // rows, _PROBE_COLUMNS, rows, dtype=torch.int64)
        for shift in (0, 4, 8):
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                ((value >> shift) & 15).contiguous(), 1
            )
            bytes_ = packed.reshape(-1, _PROBE_COLUMNS, rows // 2)
            found += torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1).long() << shift
        return found

    rows_found, columns_found = where(row), where(column)
    first = torch.arange(0, probe_rows, rows)[:, None, None]
    inside = (rows_found - first)[0, 0]
    regular = (rows_found == first + inside).all() and (
        columns_found == torch.arange(_PROBE_COLUMNS)[None, :, None]
    ).all()
    if not regular or inside.sort().values.ne(torch.arange(rows)).any():
        raise LookupError(f"the int4pack layout is not made of blocks of {rows} rows")
    return _Block(rows, inside.argsort())
