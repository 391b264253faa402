"""Integer codes of 1 to 8 bits in 32-bit words, as compressed-tensors' `pack-quantized` stores them.

A row is one stream of bits, lowest first: element k begins at bit k * bits, also where it reaches over two words.
"""

from __future__ import annotations

import torch

from quantkit.kernels.packing import pack_int4, unpack_int4

# 32 elements of b bits are b whole words.
_ELEMENTS = 32


def packed_words(columns: int, bits: int) -> int:
    """Words that a row of `columns` codes takes."""
    return -(-columns * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack signed codes row by row.

    Args:
        codes: int8 [N, K], values in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 1 to 8.

    Returns:
        int32 [N, ceil(K * bits / 32)] of code + 2^(bits-1).

    Raises:
        ValueError: the codes are not a matrix, or `bits` is out of range.
    """
    _check(bits)
    if codes.dim() != 2:
        raise ValueError(f"codes must be [N, K], got {tuple(codes.shape)}")
    rows, columns = codes.shape
    if bits == 4 and columns % 8 == 0:
        return pack_int4(codes)
    groups = -(-columns // _ELEMENTS)
    unsigned = codes.new_zeros((rows, groups * _ELEMENTS), dtype=torch.int32)
    unsigned[:, :columns] = codes.int() + 2 ** (bits - 1)
    unsigned = unsigned.view(rows, groups, _ELEMENTS)
    words = unsigned.new_zeros((rows, groups, bits))
    for element in range(_ELEMENTS):
        word, shift = divmod(element * bits, 32)
        words[..., word] |= unsigned[..., element] << shift
        if shift + bits > 32:
            words[..., word + 1] |= unsigned[..., element] >> (32 - shift)
    return words.view(rows, -1)[:, : packed_words(columns, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: int32 [N, words] -> int8 [N, columns].

    Raises:
        ValueError: `packed` has not as many words as `columns` codes take, or `bits` is out of range.
    """
    _check(bits)
    if packed.dim() != 2 or packed.shape[1] != packed_words(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits are {packed_words(columns, bits)} words, got {tuple(packed.shape)}"
        )
    if bits == 4 and columns % 8 == 0:
        return unpack_int4(packed)
    rows, groups = packed.shape[0], -(-columns // _ELEMENTS)
    words = packed.new_zeros((rows, groups * bits))
    words[:, : packed.shape[1]] = packed
    words = words.view(rows, groups, bits)
    codes = torch.empty((rows, groups, _ELEMENTS), dtype=torch.int8, device=packed.device)
    for element in range(_ELEMENTS):
        word, shift = divmod(element * bits, 32)
        low = min(bits, 32 - shift)
        # A shift to the right copies the sign: the mask takes that off.
        value = (words[..., word] >> shift) & (2**low - 1)
        if low < bits:
            value |= (words[..., word + 1] & (2 ** (bits - low) - 1)) << low
        codes[..., element] = value - 2 ** (bits - 1)
    return codes.view(rows, -1)[:, :columns].contiguous()


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
