"""Attention over INT4 keys and values, decoding: the packed cache is read once, in 16-bit words of four codes.

    words [BN, D/4] of keys, then of values --- cp.async, num_stages deep ---> shared --> registers
        shift, one mask: 128 + u = 136 + q in bf16, four operands [BN, D/4] of a word's four nibbles
                |                                                    |
    scores [BM, BN] = sum of 4 dots with the query's columns    out_i [BM, D/4] += weights . values_i
                |                                                    |
    - 136 sum(query), x key scales x query scale            - 136 sum(weights), at the end
                |                                                    ^
    mask, online softmax in base 2 ------ weights x value scales ----+

The rows of a tile are the queries that read one head's keys: all heads of its group, all tokens. Few rows
leave most of a GPU idle, so the keys are split over programs, whose results a second kernel combines in a
fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from ..dispatch import interpreting
from . import tuning
from .build import Build
from .kv4_cache import Hidden, Packed
from .kv4_decode_kernels import attention_kernel, combine_kernel

Config = dict[str, int]
ROWS = 64  # the most: queries that read one KV head
_TILE = 16
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
_LOG2_E = 1.4426950408889634


def attention(
    query: torch.Tensor,
    key: Packed,
    value: Packed,
    seen: Hidden,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None,
    quantize_query: bool,
    length: torch.Tensor | None = None,
    window: int = 0,
    config: Config | None = None,
) -> torch.Tensor:
    """`kv4_attention` of few rows, over readable caches; `config` instead of the tuned one."""
    batch, heads, tokens, dim = query.shape
    kv_heads, size = key.codes.shape[1:3]
    group = heads // kv_heads
    query = query if query.stride(3) == 1 else query.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    masked = seen.mask is not None
    chosen = config or configuration(
        query.device, group * tokens, batch * kv_heads, size, dim, masked
    )
    split = chosen["SPLIT"]
    partial, stats = out, out
    if split > 1:
        partial = torch.empty((batch * heads * tokens, split, dim), device=query.device)
        stats = torch.empty((batch * heads * tokens, split, 2), device=query.device)
    attention_kernel[(triton.cdiv(group * tokens, chosen["BM"]), batch * kv_heads, split)](
        *(query, key.words, key.scales, value.words, value.scales),
        key.codes if seen.mask is None else seen.mask,
        query if post_scale is None else post_scale.float().contiguous(),
        key.codes if length is None else length,
        *(out, partial, stats, tokens, size, group, kv_heads, scaling * _LOG2_E),
        *query.stride()[:3],
        *key.words.stride()[:2],
        *key.scales.stride(),
        *seen.strides,
        DIM=dim,
        WORDS=max(16, triton.next_power_of_2(dim // 4)),
        CAUSAL=is_causal and not masked and (tokens > 1 or window > 0),
        WINDOW=window,
        MASK=0 if seen.by_key else seen.kind,
        KEY_MASK=seen.by_key,
        LENGTH=length is not None,
        POST=post_scale is not None,
        ROUND=quantize_query,
        FLOAT8=key.scales.dtype == torch.uint8,
        INTERPRET=interpreting(),
        **chosen,
    )
    if split > 1:
        combine(partial, stats, out)
    return out


def combine(partial: torch.Tensor, stats: torch.Tensor, out: torch.Tensor) -> None:
    """The splits' sums [rows, split, D], by their largest scores and totals [rows, split, 2], into out."""
    rows, split, dim = partial.shape
    columns = triton.next_power_of_2(dim)
    combine_kernel[(rows,)](
        *(partial, stats, out),
        DIM=dim,
        COLUMNS=columns,
        SPLIT=split,
        INTERPRET=interpreting(),
        num_warps=_combining_warps(split, columns),
    )


def _combining_warps(split: int, columns: int) -> int:
    """At most 128 numbers a thread: they stay in registers."""
    return max(2, split * columns // 4096)


def configuration(
    device: torch.device, rows: int, heads: int, length: int, dim: int, masked: bool
) -> Config:
    """The tuned configuration, or the heuristic's; sizes are rounded up to powers of two."""
    rows, length = triton.next_power_of_2(rows), triton.next_power_of_2(length)
    return tuning.choose(
        "kv4_attention",
        (rows, heads, length, dim, int(masked)),
        candidates(),
        heuristic(rows, heads, length, dim, tuning.processors(device)),
        device,
    )


def candidates() -> list[Config]:
    """Tiles, splits, stages and warps worth trying."""
    return [
        {"BM": _TILE, "BN": n, "SPLIT": split, "num_warps": warps, "num_stages": stages}
        for n in (32, 64, 128)
        for split in SPLITS
        for warps in (1, 2, 4)
        for stages in (2, 3, 4)
    ]


def heuristic(rows: int, heads: int, length: int, dim: int, processors: int) -> Config:
    """Enough splits for sixteen warps on every processor, of at least 256 keys each."""
    # Twice the keys at twice the width would not leave the registers that the query needs.
    keys, warps = (64, 4) if dim > 128 else (128, 4)
    # A warp's products are 16 words wide, or more: two warps would share a narrow head's, and wait for each other.
    if dim <= 64:
        keys, warps = 32, 1
    elif dim < 128:
        keys, warps = 64, 2
    tiles = heads * triton.cdiv(rows, _TILE)
    wanted = max(1, min(16 // warps * processors // tiles, length // 256))
    split = max(s for s in SPLITS if s <= wanted)
    return {"BM": _TILE, "BN": keys, "SPLIT": split, "num_warps": warps, "num_stages": 3}


def builds() -> Iterator[Build]:
    """Every head_dim, both types of scale."""
    for dim in (64, 80, 96, 128, 256):
        yield _build(dim, float8=False)
    yield _build(128, float8=True)
    for dim in (64, 80, 128):
        yield _build(dim, float8=False, key_mask=True)
    signature = {"partial": "*fp32", "stats": "*fp32", "out": "*bf16"}
    for split, dim in ((16, 128), (128, 128), (128, 256)):
        name = f"kv4_combine[{split} splits{'' if dim == 128 else f', D{dim}'}]"
        yield Build(
            name,
            combine_kernel,
            signature,
            {"DIM": dim, "COLUMNS": dim, "SPLIT": split, "INTERPRET": False},
            num_warps=_combining_warps(split, dim),
            num_stages=1,
            tile={"elements": split * dim, "bytes": split * (dim + 2) * 4},
        )


def _build(dim: int, float8: bool, key_mask: bool = False) -> Build:
    config = heuristic(4, 8, 32768, dim, 132)
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
        "CAUSAL": False, "WINDOW": 0, "MASK": 0, "KEY_MASK": key_mask, "LENGTH": True,
        "POST": True, "ROUND": True, "FLOAT8": float8, "INTERPRET": False, "scales_token": 1,
    }  # fmt: skip
    del signature["scales_token"]
    pointers = [n for n, kind in signature.items() if kind.startswith("*")]
    extra = ", mask" if key_mask else ""
    return Build(
        f"kv4_attention[decode, D{dim}, {'e4m3' if float8 else 'bf16'} scale{extra}]",
        attention_kernel,
        signature,
        constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        divisible=(*pointers, *(s for s in strides if s in signature)),
        tensor_core={80: "HMMA", 89: "HMMA", 90: "H.?MMA|HGMMA", 100: ".*MMA"},
        wide_loads=dim % 32 == 0,
        tile={
            "elements": 2 * config["BN"] * dim,
            "bytes": config["BN"] * (dim + (2 if float8 else 4)),
            "operations": 4 * config["BM"] * config["BN"] * dim,
        },
    )
