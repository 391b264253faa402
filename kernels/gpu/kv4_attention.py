"""Attention over INT4 keys and values: the packed cache is read once, in 16-bit words of four codes.

    words [BN, D/4] of keys, then of values --- cp.async, num_stages deep ---> shared --> registers
        shift, one mask: 128 + u = 136 + q in bf16, four operands [BN, D/4] of a word's four nibbles
                |                                                    |
    scores [BM, BN] = sum of 4 dots with the query's columns    out_i [BM, D/4] += weights . values_i
                |                                                    |
    - 136 sum(query), x key scales x query scale            - 136 sum(weights), at the end
                |                                                    ^
    mask, online softmax in base 2 ------ weights x value scales ----+

The rows of a tile are the queries that read one head's keys: all heads of its group, all tokens. Few rows
(decoding) leave most of a GPU idle, so the keys are split over programs, whose results a second kernel
combines in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from ..dispatch import interpreting
from . import kv4_expand, tuning
from .build import Build
from .kv4_append import typed_planes
from .kv4_kernels import attention_kernel, combine_kernel

Config = dict[str, int]
DECODE_ROWS = 16
# From so many tokens on, expanding keys and values for torch's attention is taken to be faster.
EXPAND_TOKENS = 256
SPLITS = (1, 2, 4, 8, 16, 32, 64)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None,
    quantize_query: bool,
    length: torch.Tensor | None = None,
    window: int = 0,
    planar: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """`kv4_attention`; `config` instead of the tuned one."""
    batch, heads, tokens, dim = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not query.numel():
        return out
    if not size:
        return out.zero_()
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    if config is None and tokens >= EXPAND_TOKENS and not capturing:
        from ..kv4_attention import prepare_query

        prepared = prepare_query(query, kv_heads, post_scale, quantize_query, query.dtype)
        there = size if length is None else int(length)
        return kv4_expand.attention(
            prepared, key, value, mask, scaling, is_causal, there, window, planar
        )
    query = query if query.stride(3) == 1 else query.contiguous()
    (codes, scales), (value_codes, value_scales) = (
        _readable(cache, dim, planar) for cache in (key, value)
    )
    group = heads // kv_heads
    rows = group * tokens
    chosen = config or configuration(
        query.device, rows, batch * kv_heads, size, dim, mask is not None
    )
    split = chosen["SPLIT"]
    partial, stats = out, out
    if split > 1:
        partial = torch.empty((batch * heads * tokens, split, dim), device=query.device)
        stats = torch.empty((batch * heads * tokens, split, 2), device=query.device)
    strides: tuple[int, ...] = (0, 0, 0)
    kind, by_key = 0, False
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        by_key = kind == 1 and tokens == 1 and mask.shape[1] == 1
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        mask = mask.expand(batch, heads, tokens, mask.shape[3])
        strides = mask.stride()[:3]
        mask = mask.view(torch.uint8) if kind == 1 else mask
    attention_kernel[(triton.cdiv(rows, chosen["BM"]), batch * kv_heads, split)](
        query,
        codes,
        scales,
        value_codes,
        value_scales,
        codes if mask is None else mask,
        query if post_scale is None else post_scale.float().contiguous(),
        codes if length is None else length,
        out,
        partial,
        stats,
        tokens,
        size,
        group,
        kv_heads,
        scaling * 1.4426950408889634,
        *query.stride()[:3],
        *codes.stride()[:2],
        *scales.stride(),
        *strides,
        DIM=dim,
        WORDS=max(16, triton.next_power_of_2(dim // 4)),
        CAUSAL=is_causal and mask is None and (tokens > 1 or window > 0),
        WINDOW=window,
        MASK=0 if by_key else kind,
        KEY_MASK=by_key,
        LENGTH=length is not None,
        POST=post_scale is not None,
        ROUND=quantize_query,
        FLOAT8=scales.dtype == torch.uint8,
        INTERPRET=interpreting(),
        **chosen,
    )
    if split > 1:
        combine_kernel[(batch * heads * tokens,)](
            partial,
            stats,
            out,
            tokens,
            batch * heads * tokens,
            DIM=dim,
            COLUMNS=triton.next_power_of_2(dim),
            SPLIT=split,
            INTERPRET=interpreting(),
            num_warps=2,
        )
    return out


def _readable(cache: torch.Tensor, dim: int, planar: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int16 [B, H, S, D / 4] in aligned rows, and the scales' bits [B, H, S].

    A vector followed by its scale is at an odd place: such a cache is copied, packed as it is, which is
    a fraction of what 2-byte loads would cost.
    """
    codes, scales = typed_planes(cache, dim, planar)
    batch, head, token = codes.stride()[:3]
    if token != dim // 2 or batch % 2 or head % 2 or codes.storage_offset() % 2:
        # Not `contiguous`, which leaves the stride of a dimension of one as it is.
        codes = codes.clone(memory_format=torch.contiguous_format)
        scales = scales.clone(memory_format=torch.contiguous_format)
    return codes.view(torch.int16), scales


def configuration(
    device: torch.device, rows: int, heads: int, length: int, dim: int, masked: bool
) -> Config:
    """The tuned configuration, or the heuristic's; sizes are rounded up to powers of two."""
    rows, length = triton.next_power_of_2(rows), triton.next_power_of_2(length)
    return tuning.choose(
        "kv4_attention",
        (min(rows, 128), heads, length, dim, int(masked)),
        candidates(rows),
        heuristic(rows, heads, length, dim, tuning.processors(device), masked),
        device,
    )


def candidates(rows: int) -> list[Config]:
    """Tiles, splits, stages and warps worth trying."""
    if rows <= 4 * DECODE_ROWS:
        return [
            {"BM": 16, "BN": n, "SPLIT": split, "num_warps": warps, "num_stages": stages}
            for n in (32, 64, 128)
            for split in SPLITS
            for warps in (1, 2, 4)
            for stages in (2, 3, 4)
        ]
    return [
        {"BM": m, "BN": n, "SPLIT": 1, "num_warps": warps, "num_stages": stages}
        for m in (32, 64)
        for n in (32, 64)
        for warps in (4, 8)
        for stages in (2, 3)
    ]


def heuristic(
    rows: int, heads: int, length: int, dim: int, processors: int, masked: bool = False
) -> Config:
    """Few rows: enough splits for four programs on every processor, of at least 256 keys each."""
    # Twice the keys at twice the width would not leave the registers that the query needs.
    keys, warps = (64, 4) if dim > 128 else (128, 4)
    if triton.next_power_of_2(dim // 4) * 4 != dim:
        keys = 64  # the padding takes registers, too
    if masked:
        keys = 64  # and so does a mask
    if dim <= 64:
        keys, warps = 64, 2  # four warps would all do the same 16 columns
    if rows <= 4 * DECODE_ROWS:
        tiles = heads * triton.cdiv(rows, 16)
        wanted = max(1, min(4 * processors // tiles, length // 256))
        split = max(s for s in SPLITS if s <= wanted)
        stages = 2 if dim > 128 else 3
        return {"BM": 16, "BN": keys, "SPLIT": split, "num_warps": warps, "num_stages": stages}
    return {"BM": 32, "BN": 32, "SPLIT": 1, "num_warps": 4, "num_stages": 2}


def builds() -> Iterator[Build]:
    """Decoding and prompts at every head_dim, both types of scale."""
    for dim in (64, 80, 96, 128, 256):
        yield _build(dim, 4, 32768, float8=False)
        yield _build(dim, 4096, 4096, float8=False)
    yield _build(128, 4, 32768, float8=True)
    yield _build(128, 4, 32768, float8=False, key_mask=True)
    signature = {"partial": "*fp32", "stats": "*fp32", "out": "*bf16", "T": "i32", "ROWS": "i32"}
    yield Build(
        "kv4_combine[16 splits]",
        combine_kernel,
        signature,
        {"DIM": 128, "COLUMNS": 128, "SPLIT": 16, "INTERPRET": False},
        num_warps=2,
        num_stages=1,
        tile={"elements": 16 * 128, "bytes": 16 * 130 * 4},
    )


def _build(dim: int, rows: int, length: int, float8: bool, key_mask: bool = False) -> Build:
    config = heuristic(rows, 8, length, dim, 132, key_mask)
    signature = dict.fromkeys(("T", "S", "GROUP", "KV_HEADS"), "i32")
    signature |= dict.fromkeys(("partial", "stats", "post_scale"), "*fp32")
    signature |= dict.fromkeys(("query", "out"), "*bf16") | dict.fromkeys(("key", "value"), "*i16")
    signature |= dict.fromkeys(("key_scale", "value_scale"), "*u8" if float8 else "*i16")
    signature |= {"mask": "*u8", "length": "*i64", "FACTOR": "fp32"}
    parts = ("batch", "head", "token")
    strides = [f"{n}_{part}" for n in ("q", "codes", "scales", "mask") for part in parts]
    strides.remove("codes_token")
    signature |= dict.fromkeys(strides, "i64")
    words = max(16, triton.next_power_of_2(dim // 4))
    constants = {
        "DIM": dim, "WORDS": words, "BM": config["BM"], "BN": config["BN"], "SPLIT": config["SPLIT"],
        "CAUSAL": rows > 64, "WINDOW": 0, "MASK": 0, "KEY_MASK": key_mask, "LENGTH": rows <= 64,
        "POST": True, "ROUND": True, "FLOAT8": float8, "INTERPRET": False, "scales_token": 1,
    }  # fmt: skip
    del signature["scales_token"]
    pointers = [n for n, kind in signature.items() if kind.startswith("*")]
    what = "decode" if rows <= 64 else "prompt"
    extra = ", mask" if key_mask else ""
    return Build(
        f"kv4_attention[{what}, D{dim}, {'e4m3' if float8 else 'bf16'} scale{extra}]",
        attention_kernel,
        signature,
        constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        divisible=(*pointers, *(s for s in strides if s in signature)),
        tensor_core={80: "HMMA", 89: "HMMA", 90: "H.?MMA|HGMMA", 100: ".*MMA"},
        wide_loads=dim % 32 == 0 and (dim > 64 or rows <= 64),
        tile={
            "elements": 2 * config["BN"] * dim,
            "bytes": config["BN"] * (dim + (2 if float8 else 4)),
            "operations": 4 * config["BM"] * config["BN"] * dim,
        },
    )
