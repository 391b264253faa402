"""The linear layers' kernel: INT4 or 8-bit weights times 16-bit, FP8 or INT8 activations.

The output is computed transposed, y^T [N, M] = W [N, K] x^T [K, M]: Hopper's tensor cores take their left
operand from registers, which is where an INT4 weight is after it was expanded, and the right one from
shared memory, where the activations are anyway. And M may be as small as 8.

    packed [BN, unit / parts] --- global, 16-byte loads, num_stages deep ---> registers
        part 0: mask (shift, rotate)      part 1 ...            x [BM, unit] -> shared memory
           |                                |                     |  part 0^T   | part 1^T ...
           +--------- dot ------------------+---- dot ------------+-------------+
                           |
            sum of the unit (float32 or int32) x group scale [BN] -> float32 accumulator [BN, BM]
                           |
        split-K: float32 partial sums; the program that comes last adds them up in a fixed order
                           |
             x row scale [BM] + bias [BN], SiLU(gate) * up, rounded, + residual -> y [M, N]

Group scales are applied to a group's sum, so that nothing is rounded before float32 (but for ROUNDED).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .casts import round_to
from .int4_operands import (
    C_DENSE,
    C_FLOAT8,
    C_HALF,
    C_HALF_INTEGER,
    C_ROUNDED,
    operand,
)

_ROW_TILES: tl.constexpr = tl.constexpr(
    8
)  # a column of tiles this high shares what the cache holds
_ONES: tl.constexpr = tl.constexpr(16)  # columns of a product: the fewest that every GPU takes
_GROUPS_AT_A_TIME: tl.constexpr = tl.constexpr(16)


@triton.jit(do_not_specialize=["M", "STEPS", "GROUPS"])
def gemm_kernel(
    x,
    weight,
    scale,
    row_scale,
    bias,
    residual,
    y,
    partial,
    tickets,
    M,
    N,
    K,
    GROUPS,
    STEPS,
    FACTOR,
    x_stride,
    weight_stride,
    scale_row,
    scale_group,
    KIND: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS_PER_GROUP: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile y[BM rows of x, BN outputs]; with GATE the tile's BN rows are BN / 2 of gate, then of up.

    UNITS_PER_GROUP = 0 is one scale per output channel. STEPS: the units of one split.
    """
    PARTS: tl.constexpr = 4 if KIND == C_HALF else (1 if KIND == C_DENSE else 2)
    PART: tl.constexpr = UNIT // PARTS
    dtype: tl.constexpr = x.dtype.element_ty
    INTEGRAL: tl.constexpr = dtype == tl.int8
    accumulator: tl.constexpr = tl.int32 if INTEGRAL else tl.float32
    zero: tl.constexpr = 0 if INTEGRAL else 0.0
    IN_SIGNS: tl.constexpr = (KIND == C_FLOAT8) | (KIND == C_ROUNDED)
    # Hopper adds FP8 products up with fewer bits than float32 has: a fresh sum for every unit.
    CHAIN: tl.constexpr = UNITS_PER_GROUP == 0 and (INTEGRAL or KIND == C_HALF)
    FACTORED: tl.constexpr = UNITS_PER_GROUP > 0 and KIND != C_ROUNDED

    tile_n, tile_m, tile = _place(M, N, BM, BN)
    split = tl.program_id(1)
    lane = tl.arange(0, BN)
    if GATE:
        outputs = tile_n * (BN // 2) + (lane % (BN // 2))
        inside_n = outputs < N // 2
        outputs = tl.where(lane < BN // 2, outputs, outputs + N // 2)
    else:
        outputs = tile_n * BN + lane
        inside_n = outputs < N
    # Outputs past the end read row 0 and are not written: no mask on the loads that matter.
    outputs = tl.where(inside_n, outputs, 0)
    rows = tile_m * BM + tl.arange(0, BM)
    inside_m = rows < M
    part = tl.arange(0, PART)
    w_at = weight + outputs.to(tl.int64)[:, None] * weight_stride + part[None, :]
    before = w_at + (tl.where(part % 4 == 0, 3, -1))[None, :]
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + part[None, :]
    s_at = scale + outputs.to(tl.int64) * scale_row

    first = split * STEPS
    end = tl.cdiv(K, UNIT)
    last = tl.minimum(first + STEPS, end)
    channel = tl.full((BN,), 1.0, dtype=tl.float32)
    if KIND == C_ROUNDED:
        channel = channel_scale(s_at, scale_group, GROUPS, BN)
    total = tl.zeros((BN, BM), dtype=accumulator if CHAIN else tl.float32)
    weights_sum = tl.zeros((BN, _ONES), dtype=tl.float32)
    # A unit's scales are loaded one step ahead: their way through the caches is longer than a step.
    ahead = unit_factor(
        s_at, scale_group, tl.minimum(first, end - 1), channel, UNITS_PER_GROUP, KIND
    )
    for step in range(first, last):
        factor = ahead
        ahead = unit_factor(
            s_at, scale_group, tl.minimum(step + 1, end - 1), channel, UNITS_PER_GROUP, KIND
        )
        if WHOLE_K:
            packed = tl.load(w_at + step * PART)
        else:
            inside_k = (step * UNIT + part < K)[None, :]
            packed = tl.load(w_at + step * PART, mask=inside_k, other=zero)
        previous = packed
        if INTERPRET and IN_SIGNS:
            previous = tl.load(before + step * PART)
        sums = total if CHAIN else tl.zeros((BN, BM), dtype=accumulator)
        ones_sums = tl.zeros((BN, _ONES), dtype=tl.int32)
        for i in tl.static_range(PARTS):
            mask = inside_m[:, None] if WHOLE_K else inside_m[:, None] & inside_k
            values = tl.load(x_at + step * UNIT + i * PART, mask=mask, other=zero)
            if INTERPRET and KIND == C_HALF:  # whose products of bf16 are wrong
                values = values.to(tl.float32)
            left = operand(packed, previous, factor[:, None], dtype, KIND, i, INTERPRET)
            sums = tl.dot(left, tl.trans(values), sums, out_dtype=accumulator)
            if KIND == C_HALF_INTEGER:
                ones = tl.full((PART, _ONES), 1, dtype=tl.int8)
                ones_sums = tl.dot(left, ones, ones_sums, out_dtype=tl.int32)
        if CHAIN:
            total = sums
        elif FACTORED:
            total += sums.to(tl.float32) * factor[:, None]
        else:
            total += sums.to(tl.float32)
        if KIND == C_HALF_INTEGER:
            weights_sum += ones_sums.to(tl.float32) * (factor[:, None] if FACTORED else 1.0)

    total = total.to(tl.float32)
    if (
        KIND == C_HALF_INTEGER
    ):  # sum((n + 1/2) w) = sum(n w) + sum(w) / 2; all columns of it are equal
        total += (tl.sum(weights_sum, axis=1) * (0.5 / _ONES))[:, None]
    if KIND == C_ROUNDED:
        total = total * channel[:, None]
    elif UNITS_PER_GROUP == 0:
        total = total * tl.load(s_at).to(tl.float32)[:, None]
    total = total * FACTOR

    if SPLIT > 1:
        inner = lane[:, None] + tl.arange(0, BM)[None, :] * BN
        place = partial + tile.to(tl.int64) * (SPLIT * BN * BM) + inner
        tl.store(place + split * (BN * BM), total, mask=inside_m[None, :])
        # All threads' sums before the ticket, the ticket before anybody else's sums.
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets + tile, 1, sem="acq_rel")
        if ticket == SPLIT - 1:
            total = tl.zeros((BN, BM), dtype=tl.float32)
            for other in range(SPLIT):
                total += tl.load(
                    place + other * (BN * BM),
                    mask=inside_m[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(tickets + tile, 0)
            _finish(
                total, row_scale, bias, residual, y, tile_n, outputs, rows, inside_m, N,
                ROW_SCALE, BIAS, RESIDUAL, GATE, BN, BM, INTERPRET,
            )  # fmt: skip
    else:
        _finish(
            total, row_scale, bias, residual, y, tile_n, outputs, rows, inside_m, N,
            ROW_SCALE, BIAS, RESIDUAL, GATE, BN, BM, INTERPRET,
        )  # fmt: skip


@triton.jit
def _place(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """(tile along N, tile along M, their number): columns of tiles, so that neighbours share a weight."""
    program = tl.program_id(0)
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    band = program // (_ROW_TILES * tiles_n)
    high = tl.minimum(tiles_m - band * _ROW_TILES, _ROW_TILES)
    inside = program - band * _ROW_TILES * tiles_n
    return inside // high, band * _ROW_TILES + inside % high, program


@triton.jit
def unit_factor(
    s_at, scale_group, step, channel, UNITS_PER_GROUP: tl.constexpr, KIND: tl.constexpr
):
    """What a unit's sums [BN] are multiplied by; for ROUNDED 64 times the scale's e4m3 code, as fp16."""
    if UNITS_PER_GROUP > 0:
        group = (step // UNITS_PER_GROUP).to(tl.int64)
        scale = tl.load(s_at + group * scale_group).to(tl.float32)
    elif KIND == C_ROUNDED:
        scale = tl.load(s_at).to(tl.float32)
    else:
        scale = channel
    if KIND == C_ROUNDED:
        divisor = tl.where(channel > 0, channel, 1.0)
        code = tl.minimum(tl.div_rn(scale, divisor), 448.0)
        return (_round_e4m3(code) * 64).to(tl.float16)
    else:
        return scale


@triton.jit
def channel_scale(s_at, scale_group, GROUPS, BN: tl.constexpr):
    """The row's largest scale [BN] / 448."""
    largest = tl.zeros((BN,), dtype=tl.float32)
    some = tl.arange(0, _GROUPS_AT_A_TIME)
    for start in range(0, GROUPS, _GROUPS_AT_A_TIME):
        group = (start + some).to(tl.int64)[:, None]
        scales = tl.load(s_at[None, :] + group * scale_group, mask=group < GROUPS, other=0.0)
        largest = tl.maximum(largest, tl.max(scales.to(tl.float32), axis=0))
    return tl.div_rn(largest, tl.full((BN,), 448.0, dtype=tl.float32))


@triton.jit
def _round_e4m3(v):
    """float32 in 0..448 -> the nearest e4m3 value, half to even, as float32."""
    bits = v.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    # Below 2^-6 the values are multiples of 2^-9, the last place of 1.5 * 2^14.
    return tl.where(v < 0.015625, (v + 24576.0) - 24576.0, normal)


@triton.jit
def _finish(
    total, row_scale, bias, residual, y, tile_n, outputs, rows, inside_m, N,
    ROW_SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Scale, bias, gate and residual of a tile's sums, and its place in y [M, N]."""
    dtype: tl.constexpr = y.dtype.element_ty
    if ROW_SCALE:
        factor = tl.load(row_scale + rows, mask=inside_m, other=0.0)
        total = total * factor[None, :]
    if BIAS:
        total += tl.load(bias + outputs).to(tl.float32)[:, None]
    if GATE:
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, BN // 2, BM)), (1, 2, 0)))
        total = gate / (1.0 + tl.exp(-gate)) * up
        column = tile_n * (BN // 2) + tl.arange(0, BN // 2)
        width = N // 2
    else:
        column = tile_n * BN + tl.arange(0, BN)
        width = N
    inside = (column < width)[:, None] & inside_m[None, :]
    at = rows.to(tl.int64)[None, :] * width + column[:, None]
    if RESIDUAL:
        # Rounded before it is added: the same as an addition behind the product.
        total = round_to(total, dtype, INTERPRET)
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, round_to(total, dtype, INTERPRET).to(dtype), mask=inside)
