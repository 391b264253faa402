"""Rows of activations to codes in one pass: quantization alone, after an RMS norm, after a SiLU gate.

One program per row; the row stays in registers between what comes before (norm, gate), the scale and
the codes, so that every element is read once and written once. A row of more than `quantize_fp8.LARGEST_ROW`
numbers passes in pieces, twice (a norm's three times), of which the later passes read the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from ..quantize_fp8 import LARGEST_ROW
from .build import Build
from .casts import by_hand, divide, round_even, round_to, to_e4m3_bits

PLAIN, NORM, GATE = 0, 1, 2
FLOAT8, INTEGER, HALF_INTEGER = 0, 1, 2
_PIECE = 8192  # of a longer row
FORMS = {"fp8": FLOAT8, "int8": INTEGER, "half": HALF_INTEGER}


# Four codes to a word. What is added leaves a float's integer, or its floor, in the bits' last byte.
_PACK = "prmt.b32 a, a, b, 0x0040; prmt.b32 c, c, d, 0x0040; prmt.b32 $0, a, c, 0x5410;"
_NEAREST: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a, b, c, d; add.rn.f32 a, $1, 0f4B400000; add.rn.f32 b, $2, 0f4B400000;"
    f" add.rn.f32 c, $3, 0f4B400000; add.rn.f32 d, $4, 0f4B400000; {_PACK} }}"
)
_BELOW: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a, b, c, d; add.rm.f32 a, $1, 0f4B400000; add.rm.f32 b, $2, 0f4B400000;"
    f" add.rm.f32 c, $3, 0f4B400000; add.rm.f32 d, $4, 0f4B400000; {_PACK} }}"
)
_E4M3: tl.constexpr = tl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;"
    " cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }"
)


@triton.jit
def encode(
    y, K, LEVELS, FACTOR, FORM: tl.constexpr, BY_HAND: tl.constexpr, INTERPRET: tl.constexpr
):
    """A row of K float32 numbers, of any shape, padded with zeros -> (codes as uint8, scale)."""
    scale = _scale(_measure(y, FORM, INTERPRET), K, FACTOR, FORM)
    return _codes(y, scale, LEVELS, FORM, BY_HAND, INTERPRET), scale


@triton.jit
def _larger(a, b):
    """NaN where one is: as the reference's norm has it."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _measure(y, FORM: tl.constexpr, INTERPRET: tl.constexpr):
    """What a scale is made of: the sum of squares, or the largest magnitude."""
    if FORM == 2:
        return tl.sum(y * y, axis=None)
    elif INTERPRET:
        # The interpreter calls a function of ours for every number, and its own maximum passes over NaN.
        lost = tl.sum((y != y).to(tl.int32), axis=None) > 0
        return tl.where(lost, float("nan"), tl.max(tl.abs(y), axis=None))
    else:
        return tl.reduce(tl.abs(y), None, _larger)


@triton.jit
def _scale(measure, K, FACTOR, FORM: tl.constexpr):
    if FORM == 2:
        return tl.sqrt_rn(measure / K) * FACTOR
    else:
        return tl.div_rn(measure, FACTOR)


@triton.jit
def _codes(y, scale, LEVELS, FORM: tl.constexpr, BY_HAND: tl.constexpr, INTERPRET: tl.constexpr):
    """FP8 codes need no clamping: their largest number makes their scale."""
    scaled = divide(y, tl.where(scale > 0, scale, 1.0), INTERPRET)
    if FORM == 0:
        if BY_HAND:
            clamped = tl.where(scaled != scaled, scaled, tl.clamp(scaled, -448.0, 448.0))
            codes = to_e4m3_bits(clamped, BY_HAND)
        else:
            codes = tl.inline_asm_elementwise(
                _E4M3, "=r,f,f,f,f", [scaled], dtype=tl.uint8, is_pure=True, pack=4
            )
    elif INTERPRET:
        if FORM == 1:
            codes = tl.clamp(round_even(scaled), -LEVELS, LEVELS)
        else:
            codes = tl.clamp(tl.floor(scaled), -LEVELS, LEVELS - 1)
        codes = codes.to(tl.int32).to(tl.int8).to(tl.uint8, bitcast=True)
    elif FORM == 1:
        codes = tl.inline_asm_elementwise(
            _NEAREST,
            "=r,f,f,f,f",
            [tl.minimum(tl.maximum(scaled, -LEVELS), LEVELS)],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        codes = tl.inline_asm_elementwise(
            _BELOW,
            "=r,f,f,f,f",
            [tl.minimum(tl.maximum(scaled, -LEVELS), LEVELS - 0.5)],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    return codes


@triton.jit
def _summed(
    x,
    residual,
    column,
    inside,
    RESIDUAL: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """x, with the residual added in x's type, as float32."""
    value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        other = tl.load(residual + column, mask=inside, other=0.0)
        value = round_to(value + other.to(tl.float32), dtype, INTERPRET)
    return value


@triton.jit
def _normed(value, rms, weight, column, inside, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return round_to(factor * round_to(value * rms, dtype, INTERPRET), dtype, INTERPRET)


@triton.jit
def _gated(value, x, column, inside, K, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    up = tl.load(x + K + column, mask=inside, other=0.0).to(tl.float32)
    gate = round_to(value / (1.0 + tl.exp(-value)), dtype, INTERPRET)
    return round_to(gate * up, dtype, INTERPRET)


@triton.jit
def rows_kernel(
    x,
    weight,
    residual,
    y_out,
    hidden_out,
    codes,
    scales,
    K,
    x_stride,
    residual_stride,
    EPS,
    LEVELS,
    FACTOR,
    BEFORE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_HAND: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    dtype: tl.constexpr = x.dtype.element_ty
    x += row * x_stride
    residual += row * residual_stride
    value = _summed(x, residual, column, inside, RESIDUAL, dtype, INTERPRET)
    if BEFORE == 1:
        if RESIDUAL:
            tl.store(hidden_out + row * K + column, value.to(dtype), mask=inside)
        rms = tl.rsqrt(tl.sum(value * value, axis=None) / K + EPS)
        value = _normed(value, rms, weight, column, inside, dtype, INTERPRET)
        tl.store(y_out + row * K + column, value.to(dtype), mask=inside)
    elif BEFORE == 2:
        value = _gated(value, x, column, inside, K, dtype, INTERPRET)
    encoded, scale = encode(value, K, LEVELS, FACTOR, FORM, BY_HAND, INTERPRET)
    tl.store(codes + row * K + column, encoded, mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def long_rows_kernel(
    x,
    weight,
    residual,
    y_out,
    hidden_out,
    codes,
    scales,
    K,
    x_stride,
    residual_stride,
    EPS,
    LEVELS,
    FACTOR,
    BEFORE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_HAND: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """`rows_kernel` in pieces of BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    x += row * x_stride
    residual += row * residual_stride
    y_out += row * K
    hidden_out += row * K
    rms = 1.0
    if BEFORE == 1:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = _summed(x, residual, column, column < K, RESIDUAL, dtype, INTERPRET)
            squares += value * value
        rms = tl.rsqrt(tl.sum(squares, axis=None) / K + EPS)
    measure = 0.0
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        value = _summed(x, residual, column, inside, RESIDUAL, dtype, INTERPRET)
        if BEFORE == 1:
            if RESIDUAL:
                tl.store(hidden_out + column, value.to(dtype), mask=inside)
            value = _normed(value, rms, weight, column, inside, dtype, INTERPRET)
            tl.store(y_out + column, value.to(dtype), mask=inside)
        elif BEFORE == 2:
            value = _gated(value, x, column, inside, K, dtype, INTERPRET)
        part = _measure(value, FORM, INTERPRET)
        measure = measure + part if FORM == 2 else _larger(measure, part)
    scale = _scale(measure, K, FACTOR, FORM)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        value = _summed(x, residual, column, inside, RESIDUAL, dtype, INTERPRET)
        if BEFORE == 1:
            value = _normed(value, rms, weight, column, inside, dtype, INTERPRET)
        elif BEFORE == 2:
            value = _gated(value, x, column, inside, K, dtype, INTERPRET)
        encoded = _codes(value, scale, LEVELS, FORM, BY_HAND, INTERPRET)
        tl.store(codes + row * K + column, encoded, mask=inside)
    tl.store(scales + row, scale)


def quantize(
    x: torch.Tensor, form: str, levels: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (codes [..., K], scale float32 [..., 1]) as the op of this form defines it.

    Args:
        form: "fp8", "int8" or "half".
        levels: the largest code: 448, 2^(bits-1) - 1, or for the half-integer grid 2^(bits-1).
        factor: largest / step; step / rms for the half-integer grid.
    """
    codes, scale = outputs(x.shape, form, x.device)
    _launch(PLAIN, x, form, levels, factor, codes, scale)
    return codes, scale


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    form: str,
    levels: float,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The op `rmsnorm_quantize`."""
    codes, scale = outputs(x.shape, form, x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    hidden = torch.empty_like(y) if residual is not None else x.new_empty(0)
    _launch(NORM, x, form, levels, factor, codes, scale, weight, eps, residual, y, hidden)
    return y, codes, scale, hidden


def gate(
    gate_up: torch.Tensor, form: str, levels: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `silu_mul_quantize`."""
    shape = torch.Size((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    codes, scale = outputs(shape, form, gate_up.device)
    _launch(GATE, gate_up, form, levels, factor, codes, scale)
    return codes, scale


def outputs(
    shape: torch.Size, form: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty codes of this shape and scales [..., 1]."""
    dtype = torch.float8_e4m3fn if form == "fp8" else torch.int8
    codes = torch.empty(shape, dtype=dtype, device=device)
    return codes, torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device)


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(
    before: int,
    x: torch.Tensor,
    form: str,
    levels: float,
    factor: float,
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> None:
    rows, k = _rows(x), codes.shape[-1]
    if not rows.shape[0]:
        return
    other = rows if residual is None else _rows(residual)
    block = triton.next_power_of_2(k) if k <= LARGEST_ROW else _PIECE
    kernel = rows_kernel if k <= LARGEST_ROW else long_rows_kernel
    kernel[(rows.shape[0],)](
        rows,
        rows if weight is None else weight.contiguous(),
        other,
        rows if y is None else y,
        rows if hidden is None else hidden,
        codes.view(torch.uint8),
        scale,
        k,
        rows.stride(0),
        other.stride(0),
        eps,
        float(levels),
        float(factor),
        BEFORE=before,
        RESIDUAL=residual is not None,
        FORM=FORMS[form],
        BLOCK=block,
        BY_HAND=by_hand(x.device),
        INTERPRET=interpreting(),
        num_warps=warps(block, before),
    )


def warps(block: int, before: int) -> int:
    """Eight elements (16 bytes of bf16) a thread and load, four loads in flight."""
    # A norm's two or three rows in few registers would spill.
    return min(8 if before == NORM else 16, max(1, block // 1024))


_POINTERS = ("x", "weight", "residual", "y_out", "hidden_out")


# Read and written for an element: x, the residual, y, their sum, the code; the gate; x and the code.
_BYTES = {PLAIN: 3, NORM: 9, GATE: 5}


def builds() -> Iterator[Build]:
    """Every prologue and form at the row sizes of an 8B model."""
    for before, name in ((PLAIN, "quantize"), (NORM, "rmsnorm"), (GATE, "silu_mul")):
        for form, code in FORMS.items():
            for k in (4096, 14336, 53248):
                long = k > LARGEST_ROW
                block = _PIECE if long else triton.next_power_of_2(k)
                piece = block if long else k
                signature = dict.fromkeys(_POINTERS, "*bf16") | {
                    "codes": "*u8", "scales": "*fp32", "K": "i32",
                    "x_stride": "i64", "residual_stride": "i64",
                    "EPS": "fp32", "LEVELS": "fp32", "FACTOR": "fp32",
                }  # fmt: skip
                for by_hand_, capabilities in ((True, (80,)), (False, (89, 90, 100))):
                    yield Build(
                        f"rows[{name}, {form}, K{k}]",
                        long_rows_kernel if long else rows_kernel,
                        signature,
                        {
                            "BEFORE": before,
                            "RESIDUAL": before == NORM,
                            "FORM": code,
                            "BLOCK": block,
                            "BY_HAND": by_hand_,
                            "INTERPRET": False,
                        },
                        num_warps=warps(block, before),
                        num_stages=1,
                        divisible=(*_POINTERS, "codes", "K", "x_stride", "residual_stride"),
                        capabilities=capabilities,
                        tile={"elements": piece, "bytes": piece * _BYTES[before]},
                    )
