"""The kernels of decoding over INT4 keys and values: see `kv4_decode` for the picture and the launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .casts import from_e4m3_bits, round_to, round_to_e4m3

# What the operand of a code has too much: 128 of bf16's mantissa, 8 of the code's own.
_OFFSET: tl.constexpr = tl.constexpr(136.0)
_NIBBLE: tl.constexpr = tl.constexpr(
    tuple(
        "{ .reg .b32 a; shr.u32 a, $1, "
        f"{4 * part}; lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea; }}"
        for part in range(4)
    )
)


@triton.jit
def _operand(words, PART: tl.constexpr, INTERPRET: tl.constexpr):
    """Words [BN, W] -> 136 + q of their nibble PART, in bf16 (float32 in the interpreter)."""
    if INTERPRET:
        return ((words >> (4 * PART)) & 15).to(tl.float32) + 128.0
    else:
        return tl.inline_asm_elementwise(
            _NIBBLE[PART], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )


@triton.jit
def _scales(bits, FLOAT8: tl.constexpr):
    if FLOAT8:
        return from_e4m3_bits(bits.to(tl.int32))
    else:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _query(x, column, inside, post_scale, POST: tl.constexpr):
    value = tl.load(x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if POST:
        factor = tl.load(post_scale + column[None, :], mask=inside, other=1.0)
        value = tl.div_rn(value, factor + tl.zeros_like(value))
    return value


@triton.jit
def _round_query(value, scale, ROUND: tl.constexpr, INTERPRET: tl.constexpr):
    """The operand (bf16) of a query part: its FP8 number, or its own in bf16; as float32 beside it."""
    if ROUND:
        scaled = tl.div_rn(value, tl.where(scale > 0, scale, 1.0) + tl.zeros_like(value))
        value = round_to_e4m3(tl.clamp(scaled, -448.0, 448.0))
    else:
        value = round_to(value, tl.bfloat16, INTERPRET)
    if INTERPRET:
        return value, value
    else:
        return value.to(tl.bfloat16), value


@triton.jit
def _queries(
    x, post, word, inside, FACTOR,
    DIM: tl.constexpr, POST: tl.constexpr, ROUND: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Queries at x [BM, 1] -> (their operands for a word's four nibbles, their offsets, their scores' factors)."""
    # Columns of a word's nibbles: 2w, 2w + D / 2, 2w + 1, 2w + 1 + D / 2.
    x0 = _query(x, 2 * word, inside, post, POST)
    x1 = _query(x, 2 * word + DIM // 2, inside, post, POST)
    x2 = _query(x, 2 * word + 1, inside, post, POST)
    x3 = _query(x, 2 * word + 1 + DIM // 2, inside, post, POST)
    factor = tl.zeros([x.shape[0]], tl.float32) + FACTOR
    scale = tl.zeros([x.shape[0], 1], tl.float32) + 1.0
    if ROUND:
        top = tl.maximum(tl.max(tl.abs(x0), 1), tl.max(tl.abs(x1), 1))
        top = tl.maximum(top, tl.maximum(tl.max(tl.abs(x2), 1), tl.max(tl.abs(x3), 1)))
        scale = tl.div_rn(top, 448.0)[:, None]
        # Never zero: a query of zeros has scores of zero by itself, and masks are divided by this.
        factor *= tl.where(top > 0, tl.div_rn(top, 448.0), 1.0)
    q0, x0 = _round_query(x0, scale, ROUND, INTERPRET)
    q1, x1 = _round_query(x1, scale, ROUND, INTERPRET)
    q2, x2 = _round_query(x2, scale, ROUND, INTERPRET)
    q3, x3 = _round_query(x3, scale, ROUND, INTERPRET)
    return q0, q1, q2, q3, tl.sum(x0 + x1 + x2 + x3, axis=1) * _OFFSET, factor


@triton.jit
def _part(
    length, token, split, T, S,
    BN: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """(begin, end) of the keys of one split that any of the tokens sees, and how many keys there are in all."""
    there = S
    if LENGTH:
        there = tl.minimum(tl.load(length).to(tl.int32), S)
    begin = there * 0
    end = there
    if CAUSAL:
        end = tl.minimum(there, there - T + tl.max(token).to(tl.int32) + 1)
        if WINDOW > 0:
            begin = tl.maximum(0, there - T + tl.min(token).to(tl.int32) + 1 - WINDOW)
    if SPLIT > 1:
        each = tl.cdiv(tl.cdiv(end - begin, SPLIT), BN) * BN
        end = tl.minimum(end, begin + (split + 1) * each)
        begin = begin + split * each
    return begin, end, there


@triton.jit
def _store(y, x, inside, INTERPRET: tl.constexpr):
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(y, round_to(x, dtype, INTERPRET).to(dtype), mask=inside)


@triton.jit
def _scores(q0, q1, q2, q3, words, offset, key_factor, bias, INTERPRET: tl.constexpr):
    """[BM, BN]: the query's numbers times the keys', without the query's factor; -inf where bias is."""
    scores = tl.dot(q0, tl.trans(_operand(words, 0, INTERPRET)))
    scores = tl.dot(q1, tl.trans(_operand(words, 1, INTERPRET)), scores)
    scores = tl.dot(q2, tl.trans(_operand(words, 2, INTERPRET)), scores)
    scores = tl.dot(q3, tl.trans(_operand(words, 3, INTERPRET)), scores)
    return (scores - offset[:, None]) * key_factor[None, :] + bias[None, :]


@triton.jit
def _seen(
    scores, factor, token, batch, head, key, end, there, T, mask, mask_batch, mask_head, mask_token,
    row_inside, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Scores [BM, BN] with -inf where a query may not see a key, and an additive mask added."""
    seen = (key < end)[None, :] & row_inside[:, None]
    if CAUSAL:
        last = (there - T + token)[:, None]
        seen &= key[None, :] <= last
        if WINDOW > 0:
            seen &= key[None, :] > last - WINDOW
    if MASK > 0:
        at = (
            mask
            + batch * mask_batch
            + (head * mask_head + token * mask_token)[:, None]
            + key[None, :]
        )
        if MASK == 1:
            seen &= tl.load(at, mask=seen, other=0) != 0
        else:
            added = tl.load(at, mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
            scores += added / factor[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _add(weights, words, keep, o0, o1, o2, o3, INTERPRET: tl.constexpr):
    """What is kept of the sums [BM, W], and the weights times the values."""
    o0 = tl.dot(weights, _operand(words, 0, INTERPRET), o0 * keep[:, None])
    o1 = tl.dot(weights, _operand(words, 1, INTERPRET), o1 * keep[:, None])
    o2 = tl.dot(weights, _operand(words, 2, INTERPRET), o2 * keep[:, None])
    o3 = tl.dot(weights, _operand(words, 3, INTERPRET), o3 * keep[:, None])
    return o0, o1, o2, o3


@triton.jit
def exp2(x, INTERPRET: tl.constexpr):
    """2^x, with zero for what a float32 holds only without its leading bit: one instruction."""
    if INTERPRET:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _softmax(
    scores,
    factor,
    value_factor,
    largest,
    total,
    excess,
    EXCESS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """(weights times the values' scales, what is kept of the sums so far, and the three running sums).

    total and excess are [BM, BN] and added up over the keys only at the end: sums here would make all
    warps wait for each other. EXCESS: whether the sum of the weights times the scales is wanted.
    """
    top = tl.maximum(largest, tl.max(scores, 1) * factor)
    # A row that has seen no key yet: its weights are zeros, not NaN.
    shift = tl.where(top == float("-inf"), 0.0, top)
    keep = exp2(largest - shift, INTERPRET)
    weights = exp2(scores * factor[:, None] - shift[:, None], INTERPRET)
    total = total * keep[:, None] + weights
    weights = weights * value_factor[None, :]
    if INTERPRET:
        rounded = round_to(weights, tl.bfloat16, INTERPRET)
    else:
        # Two at once; Triton's own cast takes four times as long for each.
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [weights],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    if EXCESS:
        excess = excess * keep[:, None] + rounded.to(tl.float32)
    return rounded, keep, top, total, excess


@triton.jit(do_not_specialize=["T", "S"])
def attention_kernel(
    query,
    key,
    key_scale,
    value,
    value_scale,
    mask,
    post_scale,
    length,
    out,
    partial,
    stats,
    T,
    S,
    GROUP,
    KV_HEADS,
    FACTOR,
    q_batch,
    q_head,
    q_token,
    codes_batch,
    codes_head,
    scales_batch,
    scales_head,
    scales_token,
    mask_batch,
    mask_head,
    mask_token,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    LENGTH: tl.constexpr,
    POST: tl.constexpr,
    ROUND: tl.constexpr,
    FLOAT8: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BM queries of one head of keys over the keys of one split.

    FACTOR: of the scores, times log2(e). SPLIT > 1: the sums go to partial [rows, SPLIT, D], the
    largest scores and totals to stats [rows, SPLIT, 2].
    """
    # A padded word's nibbles are 0, as operands 128: their sums are 128 times the weights', for nothing.
    PADDED: tl.constexpr = DIM < 4 * WORDS
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    row_inside = row < GROUP * T
    row = tl.minimum(row, GROUP * T - 1)
    token = (row % T).to(tl.int64)
    head = (kv_head * GROUP + row // T).to(tl.int64)
    word = tl.arange(0, WORDS)
    word_inside = word < DIM // 4

    inside = row_inside[:, None] & word_inside[None, :]
    q0, q1, q2, q3, offset, factor = _queries(
        query + batch * q_batch + (head * q_head + token * q_token)[:, None],
        post_scale + kv_head * DIM,
        *(word, inside, FACTOR, DIM, POST, ROUND, INTERPRET),
    )
    begin, end, there = _part(length, token, split, T, S, BN, SPLIT, CAUSAL, WINDOW, LENGTH)
    place = batch * codes_batch + kv_head * codes_head + begin.to(tl.int64) * (DIM // 4)
    inner = tl.arange(0, BN)
    tile = inner[:, None] * (DIM // 4) + word[None, :]
    keys, values = key + place, value + place
    place = batch * scales_batch + kv_head * scales_head + begin.to(tl.int64) * scales_token
    key_scales, value_scales = key_scale + place, value_scale + place
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM, BN], tl.float32)
    excess = tl.zeros([BM, BN], tl.float32)
    o0 = tl.zeros([BM, WORDS], tl.float32)
    o1 = tl.zeros([BM, WORDS], tl.float32)
    o2 = tl.zeros([BM, WORDS], tl.float32)
    o3 = tl.zeros([BM, WORDS], tl.float32)
    # Blocks that every row sees whole need no comparison.
    CLOSED: tl.constexpr = CAUSAL or MASK > 0
    open_ = begin
    if not CLOSED:
        open_ = begin + tl.maximum(0, end - begin) // BN * BN
    elif MASK == 0 and WINDOW == 0:
        first = there - T + tl.min(token).to(tl.int32) + 1  # the end of what the first query sees
        open_ = begin + tl.maximum(0, tl.minimum(first, end) - begin) // BN * BN
    # Two bytes a key cannot be copied asynchronously: they are loaded a block ahead, into registers.
    there_now = inner < end - begin
    hidden = mask + batch * mask_batch + begin
    bias = tl.zeros([BN], tl.float32)
    key_bits = tl.load(key_scales + inner * scales_token, mask=there_now, other=0)
    value_bits = tl.load(value_scales + inner * scales_token, mask=there_now, other=0)
    for start in range(begin, open_, BN):
        if DIM == 4 * WORDS:
            key_words, value_words = tl.load(keys + tile), tl.load(values + tile)
        else:
            key_words = tl.load(keys + tile, mask=word_inside[None, :], other=0)
            value_words = tl.load(values + tile, mask=word_inside[None, :], other=0)
        key_factor, value_factor = _scales(key_bits, FLOAT8), _scales(value_bits, FLOAT8)
        keys += BN * (DIM // 4)
        values += BN * (DIM // 4)
        key_scales += BN * scales_token
        value_scales += BN * scales_token
        there_next = inner < end - start - BN
        key_bits = tl.load(key_scales + inner * scales_token, mask=there_next, other=0)
        value_bits = tl.load(value_scales + inner * scales_token, mask=there_next, other=0)
        if KEY_MASK:
            bias = tl.where(tl.load(hidden + inner) != 0, 0.0, float("-inf"))
            hidden += BN
        scores = _scores(q0, q1, q2, q3, key_words, offset, key_factor, bias, INTERPRET)
        weights, keep, largest, total, excess = _softmax(
            scores, factor, value_factor, largest, total, excess, not PADDED, INTERPRET
        )
        o0, o1, o2, o3 = _add(weights, value_words, keep, o0, o1, o2, o3, INTERPRET)
    if CLOSED:
        for start in range(open_, end, BN):
            number = start + inner
            inside_tile = (number < end)[:, None] & word_inside[None, :]
            key_words = tl.load(keys + tile, mask=inside_tile, other=0)
            value_words = tl.load(values + tile, mask=inside_tile, other=0)
            key_factor, value_factor = _scales(key_bits, FLOAT8), _scales(value_bits, FLOAT8)
            keys += BN * (DIM // 4)
            values += BN * (DIM // 4)
            key_scales += BN * scales_token
            value_scales += BN * scales_token
            there_next = inner < end - start - BN
            key_bits = tl.load(key_scales + inner * scales_token, mask=there_next, other=0)
            value_bits = tl.load(value_scales + inner * scales_token, mask=there_next, other=0)
            scores = _scores(q0, q1, q2, q3, key_words, offset, key_factor, bias, INTERPRET)
            scores = _seen(
                scores, factor, token, batch, head, number, end, there, T, mask, mask_batch,
                mask_head, mask_token, row_inside, MASK, CAUSAL, WINDOW,
            )  # fmt: skip
            weights, keep, largest, total, excess = _softmax(
                scores, factor, value_factor, largest, total, excess, not PADDED, INTERPRET
            )
            o0, o1, o2, o3 = _add(weights, value_words, keep, o0, o1, o2, o3, INTERPRET)
    elif open_ < end:
        number = open_ + inner
        inside_tile = (number < end)[:, None] & word_inside[None, :]
        key_words = tl.load(keys + tile, mask=inside_tile, other=0)
        value_words = tl.load(values + tile, mask=inside_tile, other=0)
        key_factor, value_factor = _scales(key_bits, FLOAT8), _scales(value_bits, FLOAT8)
        seen = number < end
        if KEY_MASK:
            seen &= tl.load(hidden + inner, mask=seen, other=0) != 0
        bias = tl.where(seen, 0.0, float("-inf"))
        scores = _scores(q0, q1, q2, q3, key_words, offset, key_factor, bias, INTERPRET)
        weights, keep, largest, total, excess = _softmax(
            scores, factor, value_factor, largest, total, excess, not PADDED, INTERPRET
        )
        o0, o1, o2, o3 = _add(weights, value_words, keep, o0, o1, o2, o3, INTERPRET)

    total = tl.sum(total, 1)
    if PADDED:
        excess = tl.sum(tl.where(word[None, :] == WORDS - 1, o0, 0.0), 1)[:, None] * (_OFFSET / 128)
    else:
        excess = tl.sum(excess, 1)[:, None] * _OFFSET
    if SPLIT > 1:
        line = (batch * KV_HEADS + kv_head) * GROUP * T + row
        y = partial + (line * SPLIT + split)[:, None] * DIM
        tl.store(stats + (line * SPLIT + split) * 2, largest, mask=row_inside)
        tl.store(stats + (line * SPLIT + split) * 2 + 1, total, mask=row_inside)
        share = tl.full([BM, 1], 1.0, tl.float32)
    else:
        y = out + ((batch * KV_HEADS * GROUP + head) * T + token)[:, None] * DIM
        share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
    column = 2 * word[None, :]
    _store(y + column, (o0 - excess) * share, inside, INTERPRET)
    _store(y + column + DIM // 2, (o1 - excess) * share, inside, INTERPRET)
    _store(y + column + 1, (o2 - excess) * share, inside, INTERPRET)
    _store(y + column + 1 + DIM // 2, (o3 - excess) * share, inside, INTERPRET)


@triton.jit
def combine_kernel(
    partial,
    stats,
    out,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One row: the splits' sums, weighed by their largest scores and totals. Rows lie as the output's do."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLIT)
    largest = tl.load(stats + (row * SPLIT + part) * 2)
    total = tl.load(stats + (row * SPLIT + part) * 2 + 1)
    top = tl.max(largest, 0)
    weight = tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top))
    sum_ = tl.sum(weight * total, 0)
    weight = weight / tl.where(sum_ > 0, sum_, 1.0)
    column = tl.arange(0, COLUMNS)
    inside = column < DIM
    at = partial + (row * SPLIT + part)[:, None] * DIM + column[None, :]
    values = tl.load(at, mask=inside[None, :], other=0.0)
    result = tl.sum(values * weight[:, None], 0)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + row * DIM + column, round_to(result, dtype, INTERPRET).to(dtype), mask=inside)
