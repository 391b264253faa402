"""The kernels of prompts over INT4 keys and values: see `kv4_prefill` for the picture and the launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .casts import divide, from_e4m3_bits, round_to, round_to_e4m3
from .kv4_decode_kernels import exp2

# A nibble u = q + 8 as a byte is the e4m3 number u / 512.
_UNSIGNED: tl.constexpr = tl.constexpr(
    ("and.b32 $0, $1, 0x0f0f0f0f;", "{ .reg .b32 a; shr.u32 a, $1, 4; and.b32 $0, a, 0x0f0f0f0f; }")
)
# The same with q's own sign and magnitude: below 8 the three low bits are complemented, and the sign is set.
_SIGNED: tl.constexpr = tl.constexpr(
    tuple(
        "{ .reg .b32 p, t, k, m; "
        + shift
        + " lop3.b32 t, p, 0x08080808, 0, 0x0c; shr.u32 k, t, 3; sub.u32 m, t, k;"
        " lop3.b32 m, p, 0x07070707, m, 0x6a; add.u32 m, m, k; shl.b32 t, t, 4; or.b32 $0, m, t; }"
        for shift in ("mov.b32 p, $1;", "shr.u32 p, $1, 4;")
    )
)
# A nibble of each 16-bit word under the mantissa of 128; 136 taken off; the scale's bf16 bits in both halves.
_SCALED: tl.constexpr = tl.constexpr(
    tuple(
        "{ .reg .b32 a, b, c; "
        f"shr.u32 a, $1, {4 * part}; lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;"
        " mov.b32 b, 0x3f803f80; mov.b32 c, 0xc308c308; fma.rn.bf16x2 a, a, b, c;"
        " mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, $2, c; }"
        for part in range(4)
    )
)
_LOG2: tl.constexpr = tl.constexpr("lg2.approx.ftz.f32 $0, $1;")
_INVERSE: tl.constexpr = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
_PAIR: tl.constexpr = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")


@triton.jit
def _float8(codes, PART: tl.constexpr, SIGNED: tl.constexpr, INTERPRET: tl.constexpr):
    """Bytes of two nibbles -> u / 512, or where SIGNED (u - 8) / 512, of their nibble PART: e4m3."""
    if INTERPRET:
        value = ((codes >> (4 * PART)) & 15).to(tl.float32)
        return (value - 8.0 if SIGNED else value) * 0.001953125
    else:
        return tl.inline_asm_elementwise(
            _SIGNED[PART] if SIGNED else _UNSIGNED[PART],
            "=r,r", [codes], dtype=tl.float8e4nv, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _half(words, scale, PART: tl.constexpr, INTERPRET: tl.constexpr):
    """Words of four nibbles [BN, W] x scale [BN, 1] (bf16, int16 bits) -> bf16(q * scale) of nibble PART."""
    if INTERPRET:
        value = ((words >> (4 * PART)) & 15).to(tl.float32) - 8.0
        return round_to(value * _bf16(scale), tl.bfloat16, INTERPRET)
    else:
        both = scale + tl.zeros_like(words)
        return tl.inline_asm_elementwise(
            _SCALED[PART], "=r,r,r", [words, both], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def _bf16(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _log2(x, INTERPRET: tl.constexpr):
    if INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(_LOG2, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _inverse(x, INTERPRET: tl.constexpr):
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(_INVERSE, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _scale_bits(bits, SCALE8: tl.constexpr):
    """A scale as it is stored -> its bf16 bits, exact (e4m3 has fewer)."""
    if SCALE8:
        value = from_e4m3_bits(bits.to(tl.int32))
        return (value.to(tl.uint32, bitcast=True) >> 16).to(tl.int16)
    else:
        return bits


@triton.jit
def prepare_kernel(
    query,
    post_scale,
    out,
    factors,
    T,
    GROUP,
    KV_HEADS,
    FACTOR,
    q_batch,
    q_head,
    q_token,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    POST: tl.constexpr,
    ROUND: tl.constexpr,
    QK8: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Queries as the products take them: out [B * Hkv, T * GROUP, WIDTH], a token's heads side by side.

    A row's numbers lie as those of the keys are unpacked: i and i + D / 2 in turns, then zeros.
    factors [2, B * Hkv, T * GROUP]: what a row's scores are multiplied by, and what its products with
    u / 512 have too much.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    number = tl.program_id(1).to(tl.int64)
    batch = number // KV_HEADS
    kv_head = number % KV_HEADS
    rows = T * GROUP
    there = row < rows
    head = kv_head * GROUP + row % GROUP
    x = query + batch * q_batch + head * q_head + (row // GROUP).to(tl.int64) * q_token
    line = tl.arange(0, WIDTH)
    column = line // 2 + (line % 2) * (DIM // 2)
    inside = there[:, None] & (line < DIM)[None, :]
    value = tl.load(x[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if POST:
        post = tl.load(post_scale + kv_head * DIM + column, mask=line < DIM, other=1.0)
        value = divide(value, post[None, :], INTERPRET)
    factor = tl.zeros([BR], tl.float32) + FACTOR
    if ROUND:
        scale = tl.div_rn(tl.max(tl.abs(value), 1), 448.0)
        scale = tl.where(scale > 0, scale, 1.0)
        value = divide(value, scale[:, None], INTERPRET)
        value = round_to_e4m3(tl.clamp(value, -448.0, 448.0))
        factor *= scale
    else:
        value = round_to(value, tl.bfloat16, INTERPRET)
    if QK8:
        factor *= 512.0
    dtype: tl.constexpr = out.dtype.element_ty
    at = number * rows + row
    place = out + at[:, None] * WIDTH + line[None, :]
    tl.store(place, value.to(dtype), mask=there[:, None])
    tl.store(factors + at, factor, mask=there)
    tl.store(
        factors + tl.num_programs(1).to(tl.int64) * rows + at,
        tl.sum(value, 1) * 0.015625,
        mask=there,
    )


@triton.jit
def _codes(cache, token, column, WIDTH: tl.constexpr):
    """Codes of tokens [BN] -> [BN, columns], of which WIDTH are there."""
    at = cache + token[:, None] * WIDTH + column[None, :]
    if column.shape[0] == WIDTH:
        return tl.load(at)
    else:
        return tl.load(at, mask=(column < WIDTH)[None, :], other=0)


@triton.jit
def _whole(words, scale, INTERPRET: tl.constexpr):
    """Words [BN, W] -> bf16(q * scale) [BN, 4 W]: a word's numbers side by side, in its nibbles' order 0, 1, 2, 3."""
    even = tl.join(_half(words, scale, 0, INTERPRET), _half(words, scale, 2, INTERPRET))
    odd = tl.join(_half(words, scale, 1, INTERPRET), _half(words, scale, 3, INTERPRET))
    return tl.reshape(tl.join(even, odd), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def _whole8(codes, INTERPRET: tl.constexpr):
    """Bytes [BN, W] -> u / 512 in e4m3 [BN, 2 W], a byte's two numbers side by side."""
    low = _float8(codes, 0, False, INTERPRET)
    high = _float8(codes, 1, False, INTERPRET)
    return tl.reshape(tl.join(low, high), (codes.shape[0], 2 * codes.shape[1]))


@triton.jit
def _seen(
    scores, row_factor, token, key, end, there, T, mask, inside,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Scores [BM, BN] with -inf where a query may not see a key, and an additive mask added."""
    seen = (key < end)[None, :] & inside[:, None]
    if CAUSAL:
        last = there - T + token
        seen &= key[None, :] <= last[:, None]
        if WINDOW > 0:
            seen &= key[None, :] > (last - WINDOW)[:, None]
    if MASK > 0:
        at = mask[:, None] + key[None, :]
        if MASK == 1:
            seen &= tl.load(at, mask=seen, other=0) != 0
        else:
            added = tl.load(at, mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
            scores += added / row_factor[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _to_bf16(x, INTERPRET: tl.constexpr):
    if INTERPRET:
        return round_to(x, tl.bfloat16, INTERPRET)
    else:
        return tl.inline_asm_elementwise(
            _PAIR, "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def _values(weights, keep, words, bits, o, high, PV8: tl.constexpr, INTERPRET: tl.constexpr):
    """Stage 3: the sums so far times `keep`, and the weights times a tile of values."""
    if PV8:
        # Hopper adds FP8 products up in few bits: sums of a tile, added in float32.
        if INTERPRET:
            rounded = round_to_e4m3(weights)
        else:
            rounded = weights.to(tl.float8e4nv)
        # In two products: the compiler cannot turn numbers side by side for FP8's right operand.
        o = o * keep[:, None] + tl.dot(rounded, _float8(words, 0, True, INTERPRET))
        high = high * keep[:, None] + tl.dot(rounded, _float8(words, 1, True, INTERPRET))
    else:
        rounded = _to_bf16(weights, INTERPRET)
        o = tl.dot(rounded, _whole(words, bits[:, None], INTERPRET), o * keep[:, None])
    return o, high


@triton.jit(do_not_specialize=["T", "S"])
def prefill_kernel(
    query,
    factors,
    key,
    key_scale,
    value,
    value_scale,
    mask,
    length,
    out,
    partial,
    stats,
    T,
    S,
    GROUP,
    KV_HEADS,
    key_batch,
    key_head,
    value_batch,
    value_head,
    scales_batch,
    scales_head,
    scales_token,
    mask_batch,
    mask_head,
    mask_token,
    DIM: tl.constexpr,
    QK8: tl.constexpr,
    PV8: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    LENGTH: tl.constexpr,
    SCALE8: tl.constexpr,
    PART8: tl.constexpr,
    PART16: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BM queries of one KV head (a token's heads side by side) over the keys that they see.

    Codes are bytes where a product is FP8 and words of two where it is bf16.
    """
    KPART: tl.constexpr = PART8 if QK8 else PART16
    VPART: tl.constexpr = PART8 if PV8 else PART16
    KPARTS: tl.constexpr = 2 if QK8 else 4
    VPARTS: tl.constexpr = 2 if PV8 else 4
    rows = T * GROUP
    # The longest first: late tiles of a causal prompt see most.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    number = tl.program_id(1).to(tl.int64)
    batch = number // KV_HEADS
    kv_head = number % KV_HEADS
    row = tile * BM + tl.arange(0, BM)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    token = row // GROUP
    first_token = tile * BM // GROUP
    last_token = tl.minimum(tile * BM + BM - 1, rows - 1) // GROUP

    at = query + (number * rows + row)[:, None] * (2 * PART8)
    q = tl.load(at + tl.arange(0, 2 * PART8)[None, :])
    row_factor = tl.load(factors + number * rows + row)
    surplus = tl.load(factors + (tl.num_programs(1) + number) * rows + row)

    there = S
    if LENGTH:
        there = tl.minimum(tl.load(length).to(tl.int32), S)
    begin = there * 0
    end = there
    if CAUSAL:
        end = tl.minimum(there, there - T + last_token + 1)
        if WINDOW > 0:
            begin = tl.maximum(0, there - T + first_token + 1 - WINDOW)
    # Blocks that every row sees whole need no comparison.
    whole = end
    if CAUSAL:
        whole = tl.minimum(end, there - T + first_token + 1)
    if SPLIT > 1:
        each = tl.cdiv(tl.cdiv(end - begin, SPLIT), BN) * BN
        end = tl.minimum(end, begin + (tl.program_id(2) + 1) * each)
        begin += tl.program_id(2) * each
    open_ = begin
    if MASK == 0 and WINDOW == 0:
        open_ += tl.maximum(0, tl.minimum(whole, end) - begin) // BN * BN
    top_key = tl.maximum(end - 1, 0)

    inner = tl.arange(0, BN)
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    key_scale += batch * scales_batch + kv_head * scales_head
    value_scale += batch * scales_batch + kv_head * scales_head
    head = kv_head * GROUP + row % GROUP
    mask_row = mask + batch * mask_batch + head * mask_head + token.to(tl.int64) * mask_token

    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    # With FP8 weights two halves, else a head's numbers in the order of their nibbles.
    o = tl.zeros([BM, VPART * (1 if PV8 else 4)], tl.float32)
    o_high = o
    for phase in tl.static_range(2):
        if phase == 0:
            low, high = begin, open_
        else:
            low, high = open_, end
        for start in range(low, high, BN):
            # Rows past the end are read again, not left out: no mask on the loads that matter.
            spot = start + inner
            safe = tl.minimum(spot, top_key) if phase == 1 else spot
            k_codes = _codes(key, safe, tl.arange(0, KPART), DIM // KPARTS)
            v_codes = _codes(value, safe, tl.arange(0, VPART), DIM // VPARTS)
            k_bits = _scale_bits(tl.load(key_scale + safe * scales_token), SCALE8)
            v_bits = _scale_bits(tl.load(value_scale + safe * scales_token), SCALE8)
            if QK8:
                scores = tl.dot(q, tl.trans(_whole8(k_codes, INTERPRET)))
                scores = (scores - surplus[:, None]) * _bf16(k_bits)[None, :]
            else:
                scores = tl.dot(q, tl.trans(_whole(k_codes, k_bits[:, None], INTERPRET)))
            if phase == 1:
                scores = _seen(
                    scores, row_factor, token, spot, end, there, T, mask_row, inside,
                    MASK, CAUSAL, WINDOW,
                )  # fmt: skip
            if PV8:
                # A weight times its value's scale is the weight of a score that much higher.
                v_scale = tl.maximum(tl.abs(_bf16(v_bits)), 7.888609052210118e-31)
                x = scores * row_factor[:, None] + _log2(v_scale, INTERPRET)[None, :]
                top = tl.maximum(largest, tl.max(x, 1))
            else:
                x = scores
                top = tl.maximum(largest, tl.max(scores, 1) * row_factor)
            # A row that has seen no key yet: its weights are zeros, not NaN.
            shift = tl.where(top == float("-inf"), 0.0, top)
            keep = exp2(largest - shift, INTERPRET)
            largest = top
            if PV8:
                weights = exp2(x - (shift - 8.807354922057604)[:, None], INTERPRET)
                total = total * keep + tl.sum(weights * _inverse(v_scale, INTERPRET)[None, :], 1)
                weights *= tl.where(v_bits < 0, -1.0, 1.0)[None, :]
            else:
                weights = exp2(scores * row_factor[:, None] - shift[:, None], INTERPRET)
                total = total * keep + tl.sum(weights, 1)
            o, o_high = _values(weights, keep, v_codes, v_bits, o, o_high, PV8, INTERPRET)

    line = (batch * KV_HEADS * GROUP + head) * T + token
    lane = tl.arange(0, PART8)
    written = inside[:, None] & (lane < DIM // 2)[None, :]
    if SPLIT > 1:
        line = line * SPLIT + tl.program_id(2)
        tl.store(stats + line * 2, largest, mask=inside)
        tl.store(stats + line * 2 + 1, total, mask=inside)
        y = partial
        share = tl.full([BM, 1], 1.0, tl.float32)
    else:
        y = out
        share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
    if PV8:
        share *= 512.0
        low_half, high_half = o, o_high
    else:
        # Nibbles belong to the two halves of a head in turns.
        low_half, high_half = tl.split(tl.reshape(o, (BM, PART8, 2)))
    dtype: tl.constexpr = y.dtype.element_ty
    place = y + line[:, None] * DIM + lane[None, :]
    tl.store(place, round_to(low_half * share, dtype, INTERPRET).to(dtype), mask=written)
    tl.store(
        place + DIM // 2, round_to(high_half * share, dtype, INTERPRET).to(dtype), mask=written
    )
