"""New keys and values into an INT4 cache: RoPE, scale, quantization and writing, one pass each.

query [BT, D] -- RoPE --> query
key   [BT, D] -- RoPE -- x factor -- largest / -8 -> scale -> codes -- pairs (i, i + D / 2) --> cache
value [BT, D] ---------------------- largest / -8 -> scale -> codes -- pairs (i, i + D / 2) --> cache
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from ..kv4 import planes
from .build import Build
from .casts import by_hand, divide, from_e4m3_bits, round_even, round_to, to_e4m3_bits


@triton.jit
def append_kernel(
    query,
    key,
    value,
    cos,
    sin,
    factor,
    out,
    key_codes,
    key_scales,
    value_codes,
    value_scales,
    positions,
    T,
    HEADS,
    KV_HEADS,
    DIM,
    TURNED,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    codes_batch,
    codes_head,
    codes_token,
    scales_batch,
    scales_head,
    scales_token,
    ROPE: tl.constexpr,
    FACTOR: tl.constexpr,
    FLOAT8: tl.constexpr,
    HALF: tl.constexpr,
    BT: tl.constexpr,
    BY_HAND: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BT tokens of one head of one batch row: of the query, then of the keys, then of the values."""
    token = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    number = tl.program_id(2)
    pair = tl.arange(0, HALF)
    inside = (token < T)[:, None] & (pair < DIM // 2)[None, :]
    dtype: tl.constexpr = query.dtype.element_ty
    turn_cos = cos + batch * cos_batch + token[:, None] * cos_token
    turn_sin = sin + batch * sin_batch + token[:, None] * sin_token
    if number < HEADS:
        x = query + batch * q_batch + number.to(tl.int64) * q_head + token[:, None] * q_token
        y = out + ((batch * HEADS + number) * T + token[:, None]) * DIM
        first = _turned(x, pair, turn_cos, turn_sin, inside, TURNED, ROPE, dtype, INTERPRET)
        second = _turned(
            x, pair + DIM // 2, turn_cos, turn_sin, inside, TURNED, ROPE, dtype, INTERPRET
        )
        tl.store(y + pair[None, :], first.to(dtype), mask=inside)
        tl.store(y + pair[None, :] + DIM // 2, second.to(dtype), mask=inside)
    else:
        head = ((number - HEADS) % KV_HEADS).to(tl.int64)
        slot = tl.load(positions + token, mask=token < T, other=0)
        if number < HEADS + KV_HEADS:
            x = key + batch * k_batch + head * k_head + token[:, None] * k_token
            first = _turned(x, pair, turn_cos, turn_sin, inside, TURNED, ROPE, dtype, INTERPRET)
            second = _turned(
                x, pair + DIM // 2, turn_cos, turn_sin, inside, TURNED, ROPE, dtype, INTERPRET
            )
            if FACTOR:
                factors = factor + head * DIM + pair
                first *= tl.load(factors, mask=pair < DIM // 2, other=0.0)[None, :]
                second *= tl.load(factors + DIM // 2, mask=pair < DIM // 2, other=0.0)[None, :]
            codes, scales = key_codes, key_scales
        else:
            x = value + batch * v_batch + head * v_head + token[:, None] * v_token
            first = tl.load(x + pair[None, :], mask=inside, other=0.0).to(tl.float32)
            second = tl.load(x + pair[None, :] + DIM // 2, mask=inside, other=0.0).to(tl.float32)
            codes, scales = value_codes, value_scales
        codes += batch * codes_batch + head * codes_head + slot[:, None] * codes_token
        scales += batch * scales_batch + head * scales_head + slot * scales_token
        packed, stored = _pack(first, second, FLOAT8, BY_HAND, INTERPRET)
        tl.store(codes + pair[None, :], packed, mask=inside)
        tl.store(scales, stored, mask=token < T)


@triton.jit
def _turned(
    x, column, cos, sin, inside, TURNED, ROPE: tl.constexpr, dtype: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Columns of x after RoPE, each step rounded to dtype as a model in eager mode does."""
    value = tl.load(x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROPE:
        half = TURNED // 2
        there = inside & (column < TURNED)[None, :]
        partner = tl.where(column < half, column + half, column - half)
        swapped = tl.load(x + partner[None, :], mask=there, other=0.0).to(tl.float32)
        c = tl.load(cos + column[None, :], mask=there, other=1.0).to(tl.float32)
        s = tl.load(sin + column[None, :], mask=there, other=0.0).to(tl.float32)
        s = tl.where((column < half)[None, :], -s, s)
        value = round_to(value * c, dtype, INTERPRET) + round_to(swapped * s, dtype, INTERPRET)
        value = round_to(value, dtype, INTERPRET)
    return value


@triton.jit
def _pack(first, second, FLOAT8: tl.constexpr, BY_HAND: tl.constexpr, INTERPRET: tl.constexpr):
    """Two halves of vectors [BT, HALF] -> bytes [BT, HALF] and the scales' bits [BT]."""
    highest = tl.maximum(tl.max(first, axis=1), tl.max(second, axis=1))
    lowest = tl.minimum(tl.min(first, axis=1), tl.min(second, axis=1))
    # min and max pass over NaN.
    bad = (tl.max((first != first).to(tl.int32), axis=1) > 0) | (
        tl.max((second != second).to(tl.int32), axis=1) > 0
    )
    # The element of the largest magnitude gets the code -8: the scale has the other sign.
    magnitude = tl.abs(tl.maximum(highest, -lowest)) * 0.125
    if FLOAT8:
        magnitude = tl.clamp(magnitude, 0.001953125, 448.0)
    scale = tl.where(bad, float("nan"), tl.where(highest > -lowest, -magnitude, magnitude))
    if FLOAT8:
        stored = to_e4m3_bits(scale, BY_HAND)
        scale = from_e4m3_bits(stored.to(tl.int32))
    else:
        scale = round_to(scale, tl.bfloat16, INTERPRET)
        stored = (scale.to(tl.uint32, bitcast=True) >> 16).to(tl.int16)
    # `divide` takes no negative scales.
    sign = tl.where(scale < 0, -1.0, 1.0)[:, None]
    divisor = tl.where(tl.abs(scale) > 0, tl.abs(scale), 1.0)[:, None]
    low = tl.clamp(round_even(divide(first * sign, divisor, INTERPRET)), -8.0, 7.0) + 8.0
    high = tl.clamp(round_even(divide(second * sign, divisor, INTERPRET)), -8.0, 7.0) + 8.0
    packed = low.to(tl.int32) | (high.to(tl.int32) << 4)
    return packed.to(tl.uint8), stored


def append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    positions: torch.Tensor,
    factor: torch.Tensor | None,
    planar: bool,
) -> torch.Tensor:
    """`kv4_append`; without cos and sin, keys are taken as they are, and the query is not read."""
    batch, heads, tokens, dim = query.shape if cos is not None else (len(key), 0, *key.shape[2:])
    kv_heads = key.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not batch * tokens * (heads + kv_heads):
        return out
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    turns = [t if t.stride(2) == 1 else t.contiguous() for t in (cos, sin) if t is not None]
    turn_strides = [s for t in turns for s in (t.stride(0) if len(t) > 1 else 0, t.stride(1))]
    (key_codes, key_scales), (value_codes, value_scales) = (
        typed_planes(cache, dim, planar) for cache in (key_cache, value_cache)
    )
    block = min(16, triton.next_power_of_2(tokens))
    append_kernel[(triton.cdiv(tokens, block), batch, heads + 2 * kv_heads)](
        query,
        key,
        value,
        turns[0] if turns else key,
        turns[1] if turns else key,
        key if factor is None else factor.float().contiguous(),
        out,
        key_codes,
        key_scales,
        value_codes,
        value_scales,
        positions.contiguous(),
        tokens,
        heads,
        kv_heads,
        dim,
        turns[0].shape[2] if turns else 0,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *(turn_strides or (0, 0, 0, 0)),
        *key_codes.stride()[:3],
        *key_scales.stride(),
        ROPE=bool(turns),
        FACTOR=factor is not None,
        FLOAT8=key_scales.dtype == torch.uint8,
        HALF=max(16, triton.next_power_of_2(dim // 2)),
        BT=block,
        BY_HAND=by_hand(key.device),
        INTERPRET=interpreting(),
        num_warps=1 if block < 16 else 4,
    )
    return out


def quantize(
    x: torch.Tensor, scale_dtype: torch.dtype, factor: torch.Tensor | None
) -> torch.Tensor:
    """`kv4_quantize`: the keys' part of the kernel alone, without RoPE."""
    dim = x.shape[-1]
    keys = x.reshape(-1, *((1,) * (3 - x.dim()) + tuple(x.shape))[-3:])
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    batch, heads, tokens = keys.shape[:3]
    out = x.new_empty((*x.shape[:-1], dim // 2 + scale_dtype.itemsize), dtype=torch.uint8)
    if not x.numel():
        return out
    codes, scales = typed_planes(out.view(batch, heads, tokens, -1), dim, False)
    slots = torch.arange(tokens, device=x.device)
    block = min(16, triton.next_power_of_2(tokens))
    append_kernel[(triton.cdiv(tokens, block), batch, heads)](
        *(keys, keys, keys, keys, keys, keys if factor is None else factor.float().contiguous()),
        *(keys, codes, scales, codes, scales, slots, tokens, 0, heads, dim, 0),
        *keys.stride()[:3] * 3,
        *(0, 0, 0, 0, *codes.stride()[:3], *scales.stride()),
        ROPE=False,
        FACTOR=factor is not None,
        FLOAT8=scale_dtype != torch.bfloat16,
        HALF=max(16, triton.next_power_of_2(dim // 2)),
        BT=block,
        BY_HAND=by_hand(x.device),
        INTERPRET=interpreting(),
        num_warps=1 if block < 16 else 4,
    )
    return out


def typed_planes(
    cache: torch.Tensor, head_dim: int, planar: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a cache: codes uint8 [B, H, S, D / 2], scales' bits [B, H, S] int16 (bf16) or uint8 (e4m3)."""
    codes, tails = planes(cache, head_dim, planar)
    if tails.shape[3] == 1:
        return codes, tails[..., 0]
    return codes, tails.view(torch.int16)[..., 0]


def builds() -> Iterator[Build]:
    """A token of decoding and sixteen of a prompt, head_dim 128, both types of scale."""
    strides = ("q", "k", "v", "codes", "scales")
    signature = dict.fromkeys(("T", "HEADS", "KV_HEADS", "DIM", "TURNED"), "i32")
    signature |= {f"{n}_{part}": "i64" for n in strides for part in ("batch", "head", "token")}
    signature |= {f"{n}_{part}": "i64" for n in ("cos", "sin") for part in ("batch", "token")}
    signature |= dict.fromkeys(("query", "key", "value", "cos", "sin", "out"), "*bf16")
    signature |= {"factor": "*fp32", "positions": "*i64"}
    signature |= dict.fromkeys(("key_codes", "value_codes"), "*u8")
    for float8 in (False, True):
        scales = "*u8" if float8 else "*i16"
        for block in (1, 16):
            yield Build(
                f"kv4_append[{'e4m3' if float8 else 'bf16'} scale, {block} tokens]",
                append_kernel,
                signature | dict.fromkeys(("key_scales", "value_scales"), scales),
                {
                    "ROPE": True, "FACTOR": True, "FLOAT8": float8, "HALF": 64, "BT": block,
                    "BY_HAND": False, "INTERPRET": False,
                },
                num_warps=1 if block < 16 else 4,
                num_stages=1,
                divisible=tuple(n for n in signature if n not in ("T", "HEADS", "KV_HEADS")),
                capabilities=(89, 90, 100) if float8 else (80, 89, 90, 100),
                wide_loads=block > 1,
                # Read: 16 bits; written: a query again, or four bits and a scale.
                tile={"elements": block * 128, "bytes": block * 128 * 4},
            )  # fmt: skip
