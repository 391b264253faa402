"""Packed INT4 codes to operands of tensor cores, in registers, a few operations for eight weights.

The layouts are `gpu_layout`'s. A packed element unpacks into PARTS operands of the same shape: its part
of each half or quarter of a unit of inputs. Compiled it is PTX on whole registers; in the interpreter,
which has no PTX, plain arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .casts import to_e4m3_bits

# What the activations are, and how the weight meets them.
HALF = 0  # 16-bit activations, 16-bit products
FLOAT8 = 1  # e4m3 activations, codes as e4m3 numbers: q / 512
INTEGER = 2  # int8 activations, 16 q as int8
HALF_INTEGER = 3  # the same for (n + 1/2): 16 q + 8
ROUNDED = 4  # e4m3 activations, e4m3(q * scale / 8)
DENSE = 5  # int8 or e4m3 on both sides, not packed
# What undoes the factors above.
FACTORS = {
    HALF: 1.0,
    FLOAT8: 512.0,
    INTEGER: 1 / 16,
    HALF_INTEGER: 1 / 16,
    ROUNDED: 8.0,
    DENSE: 1.0,
}
# The same names inside kernels.
C_HALF, C_FLOAT8, C_INTEGER, C_HALF_INTEGER, C_ROUNDED, C_DENSE = map(tl.constexpr, range(6))
PARTS = {HALF: 4, FLOAT8: 2, INTEGER: 2, HALF_INTEGER: 2, ROUNDED: 2, DENSE: 1}


def _sixteen_bits(finish: str, magic: str, declare: str) -> tl.constexpr:
    """A nibble of each 16-bit word under the mantissa of a power of two, which `finish` takes off."""
    return tl.constexpr(
        tuple(
            "{ .reg .b32 a, b, c; " + declare + f" shr.u32 a, $1, {4 * part};"
            f" lop3.b32 a, a, 0x000f000f, {magic}, 0x6a; {finish} }}"
            for part in range(4)
        )
    )


# 0x4308 ^ nibble is 128 + 8 + q in bf16, 0x6408 ^ nibble is 1024 + 8 + q in fp16.
_BF16: tl.constexpr = _sixteen_bits(
    "fma.rn.bf16x2 $0, a, b, c;", "0x43084308", "mov.b32 b, 0x3f803f80; mov.b32 c, 0xc308c308;"
)
_FP16: tl.constexpr = _sixteen_bits("sub.f16x2 $0, a, b;", "0x64086408", "mov.b32 b, 0x64086408;")
_SIGNS: tl.constexpr = tl.constexpr(
    (
        "{ .reg .b32 a; shf.l.wrap.b32 a, $1, $1, 4; and.b32 $0, a, 0x87878787; }",
        "and.b32 $0, $1, 0x87878787;",
    )
)
_SIXTEEN_TIMES: tl.constexpr = tl.constexpr(
    (
        "{ .reg .b32 a; shl.b32 a, $1, 4; and.b32 $0, a, 0xf0f0f0f0; }",
        "and.b32 $0, $1, 0xf0f0f0f0;",
    )
)
_ODD: tl.constexpr = tl.constexpr(
    (
        "{ .reg .b32 a; shl.b32 a, $1, 4; lop3.b32 $0, a, 0xf0f0f0f0, 0x08080808, 0xea; }",
        "lop3.b32 $0, $1, 0xf0f0f0f0, 0x08080808, 0xea;",
    )
)


@triton.jit
def operand(
    packed,
    before,
    scale,
    dtype: tl.constexpr,
    KIND: tl.constexpr,
    PART: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A tile of packed elements -> operand PART of the left side.

    Args:
        packed: [BN, part] int16, int8 or uint8; DENSE: the operand itself.
        before: the interpreter's: for "signs" each byte's predecessor in its word of four.
        scale: for ROUNDED [BN, 1] fp16: 64 times the e4m3 code of the group's scale.
        dtype: the activations'.
    """
    if KIND == C_DENSE:
        return packed
    elif INTERPRET:
        return _interpreted(packed, before, scale, KIND, PART)
    elif KIND == C_HALF:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _BF16[PART], "=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return tl.inline_asm_elementwise(
                _FP16[PART], "=r,r", [packed], dtype=tl.float16, is_pure=True, pack=2
            )
    elif (KIND == C_FLOAT8) | (KIND == C_ROUNDED):
        number = tl.inline_asm_elementwise(
            _SIGNS[PART], "=r,r", [packed], dtype=tl.float8e4nv, is_pure=True, pack=4
        )
        if KIND == C_ROUNDED:  # exact in fp16: seven bits; then one rounding
            return (number.to(tl.float16) * scale).to(tl.float8e4nv)
        else:
            return number
    else:
        return tl.inline_asm_elementwise(
            _ODD[PART] if KIND == C_HALF_INTEGER else _SIXTEEN_TIMES[PART],
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _interpreted(packed, before, scale, KIND: tl.constexpr, PART: tl.constexpr):
    if KIND == C_HALF:
        nibble = (packed >> (4 * PART)) & 15
        return ((nibble ^ 8) - 8).to(tl.float32)
    elif (KIND == C_FLOAT8) | (KIND == C_ROUNDED):
        # Rotating the word moves a byte's low half up and brings the high half of the one before.
        number = (packed if PART == 1 else (packed << 4) | (before >> 4)) & 0x87
        if KIND == C_ROUNDED:
            magnitude = (number & 7).to(tl.float32) * scale.to(tl.float32) * 0.001953125
            product = tl.where(number > 127, -magnitude, magnitude)
            number = to_e4m3_bits(product, True)
        return number.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        sixteen = (packed & -16) if PART == 1 else (packed << 4)
        return (sixteen | 8 if KIND == C_HALF_INTEGER else sixteen).to(tl.int8)
