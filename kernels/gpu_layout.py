"""The INT4 layouts that the GPU kernels read, and the way back from them.

K is cut into units of u = 128 inputs (64 where groups are of an odd multiple of 64). What lies together in
a unit unpacks into operands for two or four products over parts of the unit, with no interleaving:

  int16 [N, K / 4], "quarters", for 16-bit activations: word j of a unit holds inputs j, j + u/4, j + u/2
      and j + 3u/4, lowest bits first, two's complement. Two words in a register are two bf16 numbers
      after one mask: 0x4308 ^ code is 136 + q.
  int8 [N, K / 2], "halves", for INT8: byte j holds inputs j (low) and j + u/2 (high), two's complement.
      `p << 4` and `p & 0xF0` are 16 times the codes, as int8.
  uint8 [N, K / 2], "signs", for FP8, whose byte b in 0..15 is the number b * 2^-9: halves again, and in
      every four bytes, byte i has the sign of the high code i in bit 7, the magnitude of the low code
      i + 1 (mod 4) in bits 6..4, the sign of the low code i in bit 3 and the magnitude of the high code i
      in bits 2..0: masking with 0x87 gives the four high numbers, and rotating the word by four bits
      first the low ones. A code of -8 has no such form.

Scales stay [N, G], one per K / G inputs, but lie in memory by groups: a tile's scales are contiguous.
"""

from __future__ import annotations

import torch

from .packing import unpack_int4

UNITS = (128, 64)
_PART = 64 << 20  # codes unpacked at a time
_PER_ELEMENT = {torch.int16: 4, torch.int8: 2, torch.uint8: 2}


def unit(group: int) -> int | None:
    """Inputs of a unit for groups of this size, or None where the kernels cannot take them."""
    return next((size for size in UNITS if group and group % size == 0), None)


def repack(
    weight: torch.Tensor, scale: torch.Tensor, activations: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The stored layout -> the GPU's for activations of this type, or None where there is none.

    FP8 takes "quarters", to be multiplied in bf16 with the same meaning, where a code is -8 and on GPUs
    that have no FP8 (compute capability below 8.9).

    Args:
        weight: int32 [N, K / 8], as stored (`pack_int4`), on the device that it will run on.
        scale: [N, G]; groups of 64 n inputs, else the result is None.
        activations: bf16, fp16, e4m3 or int8.
    """
    k = weight.shape[1] * 8
    size = unit(k // scale.shape[1])
    if size is None:
        return None
    # By rows: the unpacked codes of a whole large layer would be eight times its bytes.
    parts = weight.split(max(1, _PART // max(k, 1)))
    layout = _quarters
    if activations == torch.int8:
        layout = _halves
    elif activations == torch.float8_e4m3fn and has_fp8(weight.device):
        eights = any(bool((unpack_int4(part) == -8).any()) for part in parts)
        layout = _quarters if eights else _signs
    packed = torch.cat([layout(unpack_int4(part), size) for part in parts])
    return packed, scale.t().contiguous().t()


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies FP8; a CPU does in Triton's interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def inputs(weight: torch.Tensor) -> int:
    """K of a weight in one of these layouts."""
    return weight.shape[1] * _PER_ELEMENT[weight.dtype]


def unpack(packed: torch.Tensor, group: int) -> torch.Tensor:
    """Any of the layouts -> int8 codes [N, K]."""
    size = unit(group)
    assert size is not None
    if packed.dtype == torch.int16:
        parts = [((packed << 12 - 4 * i) >> 12).to(torch.int8) for i in range(4)]
    elif packed.dtype == torch.int8:
        parts = [(packed << 4) >> 4, packed >> 4]
    else:
        quads = packed.view(len(packed), -1, 4)
        # Rotating a little-endian word left by four bits moves a nibble to the next byte.
        rotated = (quads << 4) | (quads.roll(1, dims=-1) >> 4)
        parts = [_signed(part).view(packed.shape) for part in (rotated, quads)]
    units = [part.reshape(len(packed), -1, size // len(parts)) for part in parts]
    return torch.cat(units, dim=-1).view(len(packed), inputs(packed))


def _split(codes: torch.Tensor, size: int, parts: int) -> list[torch.Tensor]:
    """Codes [N, K] -> the parts of all units, each [N, K / parts]."""
    n, k = codes.shape
    return [p.reshape(n, k // parts) for p in codes.view(n, k // size, parts, -1).unbind(2)]


def _quarters(codes: torch.Tensor, size: int) -> torch.Tensor:
    first, *others = _split(codes.to(torch.int16) & 15, size, 4)
    for i, part in enumerate(others, 1):
        first |= part << 4 * i
    return first


def _halves(codes: torch.Tensor, size: int) -> torch.Tensor:
    low, high = _split(codes, size, 2)
    return (low & 15) | (high << 4)


def _signs(codes: torch.Tensor, size: int) -> torch.Tensor:
    low, high = _split(codes, size, 2)
    next_low = low.view(len(low), -1, 4).roll(-1, dims=-1).reshape(low.shape)
    return (
        ((high < 0).to(torch.uint8) << 7)
        | (next_low.abs().to(torch.uint8) << 4)
        | ((low < 0).to(torch.uint8) << 3)
        | high.abs().to(torch.uint8)
    )


def _signed(numbers: torch.Tensor) -> torch.Tensor:
    """Bytes of sign (bit 7) and magnitude (bits 2..0) -> int8."""
    magnitude = (numbers & 7).to(torch.int8)
    return torch.where(numbers >= 128, -magnitude, magnitude)
