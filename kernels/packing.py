"""INT4 codes in 32-bit words, as stored on disk (compressed-tensors' `pack-quantized`)."""

from __future__ import annotations

import torch

PER_WORD = 8


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Pack signed INT4 codes, eight consecutive inputs to a word.

    Args:
        codes: int8 [N, K], values -8..7.

    Returns:
        int32 [N, K / 8]: u = q + 8, element k of each eight in bits 4 * (k mod 8), lowest first.

    Raises:
        ValueError: the codes are not a matrix, or K is not a multiple of 8.
    """
    if codes.dim() != 2 or codes.shape[1] % PER_WORD:
        raise ValueError(f"codes must be [N, K] with K a multiple of 8, got {tuple(codes.shape)}")
    if codes.numel() == 0:
        return codes.new_empty((codes.shape[0], codes.shape[1] // PER_WORD), dtype=torch.int32)
    # Two codes to a little-endian int16, whose low byte becomes the two nibbles: whole vectors, no strides.
    pairs = (codes.reshape(-1) + 8).view(torch.int16)
    words = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8).view(torch.int32)
    return words.reshape(len(codes), codes.shape[1] // PER_WORD)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`: int32 [N, K / 8] -> int8 [N, K], values -8..7."""
    if packed.dim() != 2 or packed.dtype != torch.int32:
        raise ValueError(f"packed must be int32 [N, K/8], got {packed.dtype} {tuple(packed.shape)}")
    pairs = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
    return nibbles.view(torch.int8).sub_(8)
