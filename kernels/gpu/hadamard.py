"""The Hadamard rotation of rows on a GPU, alone and with their quantization: one pass.

    row [K] as [R, 128] -- dot with H_128 of +-1 --> [R, 128] in float32
                                 |
        blocks wider than 128: dot [R, R] of +-1 and 0 (H_a, or a Paley order's) with it
                                 |
                 x 1 / sqrt(block) --> y, or its codes and scale

H_block = H_a (x) H_128, so that two small products do what one of K x K would. The +-1 are exact in
bf16, and so are their products with 16-bit inputs; what is float32 goes in two or three bf16 parts.
A block of another order times less than 128 has lines of whole blocks, or of its power of two, with zeros
behind them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from ..hadamard_matrices import hadamard_matrix, split_order
from ..quantize_fp8 import LARGEST_ROW
from .build import Build
from .casts import by_hand, round_to
from .rows import FORMS, encode, outputs, quantize

_WIDTH = 128
_WIDEST = 16384  # that a program rotates by blocks wider than 128
_PLAIN = -1  # no quantization


@triton.jit
def _part(value):
    """bf16 of float32, and what it leaves."""
    part = value.to(tl.bfloat16)
    return part, value - part.to(tl.float32)


@triton.jit
def _from_right(value, matrix, INTERPRET: tl.constexpr):
    """value @ matrix in float32; float32 values lose nothing that three parts of 8 bits hold."""
    if INTERPRET:
        return tl.dot(value.to(tl.float32), matrix.to(tl.float32), input_precision="ieee")
    if value.dtype != tl.float32:
        return tl.dot(value, matrix.to(value.dtype))
    high, rest = _part(value)
    middle, rest = _part(rest)
    y = tl.dot(rest.to(tl.bfloat16), matrix)
    y = tl.dot(middle, matrix, y)
    return tl.dot(high, matrix, y)


@triton.jit
def _from_left(matrix, value, PARTS: tl.constexpr, INTERPRET: tl.constexpr):
    """matrix @ value, value float32: to 16 bits in two parts, to 24 in three."""
    if INTERPRET:
        return tl.dot(matrix.to(tl.float32), value, input_precision="ieee")
    high, rest = _part(value)
    middle, rest = _part(rest)
    y = tl.dot(matrix, middle)
    if PARTS == 3:
        y = tl.dot(matrix, rest.to(tl.bfloat16), y)
    return tl.dot(matrix, high, y)


@triton.jit
def hadamard_kernel(
    x,
    inner,
    across,
    out,
    scales,
    K,
    x_stride,
    NORM,
    LEVELS,
    FACTOR,
    R: tl.constexpr,
    STEP: tl.constexpr,
    ACROSS: tl.constexpr,
    PAIR: tl.constexpr,
    FORM: tl.constexpr,
    BY_HAND: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One row of K in R lines of STEP, or with PAIR one half (K) of a row of 2 K, which is H_2 (x) H_K: the sum or the
    difference of its halves, rotated. inner [128, 128] and across [R, R] of +-1 and 0, bf16; NORM is
    1 / sqrt(block)."""
    row = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, R)
    column = tl.arange(0, 128)
    at = line[:, None] * STEP + column[None, :]
    inside = at < K
    if STEP < 128:
        inside &= column[None, :] < STEP
    dtype: tl.constexpr = x.dtype.element_ty
    matrix = tl.load(inner + column[:, None] * 128 + column[None, :])
    if PAIR:
        half = x + (row // 2) * x_stride + at
        y = _from_right(tl.load(half, mask=inside, other=0.0), matrix, INTERPRET)
        second = _from_right(tl.load(half + K, mask=inside, other=0.0), matrix, INTERPRET)
        y += tl.where(row % 2 == 0, second, -second)
    else:
        value = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
        y = _from_right(value, matrix, INTERPRET)
    if ACROSS:
        matrix = tl.load(across + line[:, None] * R + line[None, :])
        y = _from_left(matrix, y, 3 if dtype == tl.float32 else 2, INTERPRET)
    y = y * NORM
    if FORM >= 0:
        # What lies beyond K is zero still: no block reaches over it.
        codes, scale = encode(y, K, LEVELS, FACTOR, FORM, BY_HAND, INTERPRET)
        tl.store(out + row * K + at, codes, mask=inside)
        tl.store(scales + row, scale)
    else:
        y = round_to(y, out.dtype.element_ty, INTERPRET).to(out.dtype.element_ty)
        tl.store(out + row * K + at, y, mask=inside)


def rotate(
    x: torch.Tensor, block: int, transpose: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The op `hadamard`, its result in `dtype` (default: x's)."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if x.numel():
        width = _width(x.shape[-1], block)
        rows = x if width == x.shape[-1] else x.reshape(-1, max(width, block))
        _launch(rows, width, block, transpose, out, out, _PLAIN, 0.0, 0.0)
    return out


def rotate_and_quantize(
    x: torch.Tensor, block: int, form: str, levels: float, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `hadamard_quantize`; levels and factor as `rows.quantize` takes them."""
    if _width(x.shape[-1], block) != x.shape[-1]:
        return quantize(rotate(x, block, dtype=torch.float32), form, levels, factor)
    codes, scale = outputs(x.shape, form, x.device)
    if x.numel():
        width = x.shape[-1]
        _launch(x, width, block, False, codes.view(torch.uint8), scale, FORMS[form], levels, factor)
    return codes, scale


@lru_cache(maxsize=64)
def _width(k: int, block: int) -> int:
    """What of a row of k a program rotates: all of it, some blocks (they do not know of one another), or half of one.

    The square matrix of wide blocks takes room.
    """
    step = _step(block)
    most = LARGEST_ROW // _WIDTH if block <= step else _WIDEST // _WIDTH
    if block > step * most:
        return _WIDEST
    fitting = [
        n for n in range(1, k // block + 1) if k // block % n == 0 and n * block <= step * most
    ]
    return max(fitting) * block


def _step(block: int) -> int:
    """Numbers of a line: 128, or what whole blocks fill of it; the power of two of a wide block of another order."""
    if block <= _WIDTH:
        return _WIDTH // block * block
    _, power = split_order(block) or (1, block)
    return min(power, _WIDTH)


def _launch(
    x: torch.Tensor,
    width: int,
    block: int,
    transpose: bool,
    out: torch.Tensor,
    scale: torch.Tensor,
    form: int,
    levels: float,
    factor: float,
) -> None:
    """A program for every `width` of x's rows: a row, or half of one block of twice the widest."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    step = _step(block)
    lines = _lines(width, step)
    inner, across = _matrices(min(block, width), transpose, width, lines, x.device)
    hadamard_kernel[(rows.numel() // width,)](
        rows,
        inner,
        inner if across is None else across,
        out,
        scale,
        width,
        rows.stride(0),
        block**-0.5,
        float(levels),
        float(factor),
        R=lines,
        STEP=step,
        ACROSS=across is not None,
        PAIR=block > width,
        FORM=form,
        BY_HAND=by_hand(x.device),
        INTERPRET=interpreting(),
        num_warps=_warps(lines),
        num_stages=1,
    )


def _lines(k: int, step: int = _WIDTH) -> int:
    return max(16, triton.next_power_of_2(triton.cdiv(k, step)))


def _warps(lines: int) -> int:
    return 4 if lines <= 32 else 8 if lines <= 128 else 16


@lru_cache(maxsize=32)
def _matrices(
    block: int, transpose: bool, k: int, lines: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """bf16 [128, 128] and, for blocks of several lines, [lines, lines]: y = across @ x @ inner."""
    step = _step(block)
    inner = torch.zeros(_WIDTH, _WIDTH, device=device)
    if block <= step:
        matrix = hadamard_matrix(block, device)
        matrix = torch.kron(torch.eye(step // block, device=device), matrix)
        inner[:step, :step] = matrix.t() if transpose else matrix
        return inner.bfloat16(), None
    inner[:step, :step] = hadamard_matrix(step, device)
    # A product from the left: H^T where x H is meant.
    outer = hadamard_matrix(block // step, device)
    outer = outer if transpose else outer.t().contiguous()
    across = torch.zeros(lines, lines, device=device)
    used = k // step
    across[:used, :used] = torch.kron(torch.eye(k // block, device=device), outer)
    return inner.bfloat16(), across.bfloat16()


def builds() -> Iterator[Build]:
    """The widths of Llama-3-8B and the widest row; alone and quantized, narrow and wide blocks.

    Of FP8 and INT8 only narrow blocks: INT8 also as wide as a down_proj, which a recipe rotates.
    """
    signature = {
        "inner": "*bf16", "across": "*bf16", "scales": "*fp32", "K": "i32", "x_stride": "i64",
        "NORM": "fp32", "LEVELS": "fp32", "FACTOR": "fp32",
    }  # fmt: skip
    few = {FORMS["fp8"]: (4096,), FORMS["int8"]: (4096, 14336)}
    for k in (4096, 14336, 32768):
        for wide in (False, True):
            for form in (_PLAIN, *FORMS.values()):
                if form in few and (wide or k not in few[form]):
                    continue
                pair = wide and k > _WIDEST
                if form != _PLAIN and pair:
                    continue
                names = {number: name for name, number in FORMS.items()} | {_PLAIN: "bf16"}
                width = k // 2 if pair else k
                lines = _lines(width)
                fp8 = form == FORMS["fp8"]
                yield Build(
                    f"hadamard[{names[form]}, K{k}, block {'K' if wide else 128}]",
                    hadamard_kernel,
                    signature | {"x": "*bf16", "out": "*bf16" if form == _PLAIN else "*u8"},
                    {
                        "R": lines, "STEP": 128, "ACROSS": wide, "PAIR": pair, "FORM": form, "BY_HAND": False,
                        "INTERPRET": False,
                    },
                    num_warps=_warps(lines),
                    num_stages=1,
                    divisible=("x", "inner", "across", "out", "scales", "K", "x_stride"),
                    capabilities=(89, 90, 100) if fp8 else (80, 89, 90, 100),
                    tensor_core={80: "HMMA", 89: "HMMA", 90: "H.?MMA", 100: ".*MMA"},
                    tile={
                        "elements": width,
                        "bytes": width * (4 if form == _PLAIN else 3),
                        "operations": 2 * width * (128 + (3 * lines if wide else 0)),
                    },
                )  # fmt: skip
