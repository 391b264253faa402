"""Prompts over INT4 keys and values: the packed cache is read as it is, in three stages that overlap.

    codes of keys and values ------ cp.async, num_stages deep ------> shared --> registers
    1  keys: 3 operations make 8 codes e4m3 numbers (or 16-bit ones) --> shared, for the tensor cores
    2  scores [BM, BN] = queries (e4m3) . keys^T --> x key scale --> mask, online softmax --> weights
    3  out [BM, D] = out x what is kept + weights (bf16, or e4m3 x 448) . values (bf16(q * scale))

Within a program a stage waits for the one before; two programs share a processor, and while one
multiplies, the other unpacks or takes exponentials. A tile's rows are a token's heads side by side, so that
all heads of a group read a tile of keys together and a causal tile ends where its last token does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from ..dispatch import interpreting
from ..gpu_layout import has_fp8
from . import tuning
from .build import Build
from .kv4_cache import Hidden, Packed
from .kv4_decode import combine
from .kv4_prefill_kernels import prefill_kernel, prepare_kernel

Config = dict[str, int]
SPLITS = (1, 2, 4, 8, 16)
_LOG2_E = 1.4426950408889634


def attention(
    query: torch.Tensor,
    key: Packed,
    value: Packed,
    hidden: Hidden,
    scaling: float,
    is_causal: bool,
    post_scale: torch.Tensor | None,
    quantize_query: bool,
    length: torch.Tensor | None,
    window: int,
    products: str = "exact",
    config: Config | None = None,
) -> torch.Tensor:
    """`kv4_attention` by the fused kernel.

    Args:
        key, value: the caches as `kv4_cache.readable` gives them.
        hidden: the mask.
        products: "exact": weights are rounded to bf16; "fp8": to e4m3, as FireQ does.
        config: instead of the tuned one.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, size = key.codes.shape[1:3]
    group, rows = heads // kv_heads, heads // kv_heads * tokens
    crowded = hidden.mask is not None or products == "fp8"
    chosen = config or configuration(query.device, rows, batch * kv_heads, size, dim, crowded)
    eight = quantize_query and fp8_scores(query.device)
    weights8 = products == "fp8"
    q, factors = _prepared(query, kv_heads, scaling, post_scale, quantize_query, eight)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    split = chosen["SPLIT"]
    partial, stats = out, out
    if split > 1:
        partial = torch.empty((batch * heads * tokens, split, dim), device=query.device)
        stats = torch.empty((batch * heads * tokens, split, 2), device=query.device)
    prefill_kernel[(triton.cdiv(rows, chosen["BM"]), batch * kv_heads, split)](
        q,
        factors,
        *(key.codes if eight else key.words, key.scales),
        *(value.codes if weights8 else value.words, value.scales),
        *(
            key.codes if hidden.mask is None else hidden.mask,
            key.codes if length is None else length,
        ),
        *(out, partial, stats, tokens, size, group, kv_heads),
        *((key.codes if eight else key.words).stride()[:2]),
        *((value.codes if weights8 else value.words).stride()[:2]),
        *key.scales.stride(),
        *hidden.strides,
        DIM=dim,
        QK8=eight,
        PV8=weights8,
        CAUSAL=is_causal and hidden.mask is None and (tokens > 1 or window > 0),
        WINDOW=window,
        MASK=hidden.kind,
        LENGTH=length is not None,
        SCALE8=key.scales.dtype == torch.uint8,
        PART8=2 * _words(dim),
        PART16=_words(dim),
        INTERPRET=interpreting(),
        **chosen,
    )
    if split > 1:
        combine(partial, stats, out)
    return out


def _prepared(
    query: torch.Tensor,
    kv_heads: int,
    scaling: float,
    post_scale: torch.Tensor | None,
    quantize_query: bool,
    eight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries and their factors, see `prepare_kernel`."""
    batch, heads, tokens, dim = query.shape
    query = query if query.stride(3) == 1 else query.contiguous()
    rows, width = heads // kv_heads * tokens, 4 * _words(dim)
    dtype = torch.float8_e4m3fn if eight else torch.bfloat16
    dtype = torch.float32 if interpreting() else dtype  # whose products of fewer bits are wrong
    q = torch.empty((batch * kv_heads, rows, width), dtype=dtype, device=query.device)
    factors = torch.empty((2, batch * kv_heads, rows), device=query.device)
    block = 16
    prepare_kernel[(triton.cdiv(rows, block), batch * kv_heads)](
        query,
        query if post_scale is None else post_scale.float().contiguous(),
        *(q, factors, tokens, heads // kv_heads, kv_heads, scaling * _LOG2_E),
        *query.stride()[:3],
        DIM=dim,
        WIDTH=width,
        BR=block,
        POST=post_scale is not None,
        ROUND=quantize_query,
        QK8=eight,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return q, factors


def _words(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim // 4))


def fp8_scores(device: torch.device) -> bool:
    """Whether scores are FP8 products: where they are faster. 10.0 multiplies 16 bits faster than it can unpack."""
    return has_fp8(device) and capability(device) < (10, 0)


def capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU; 9.0 in the interpreter."""
    return (9, 0) if interpreting() else torch.cuda.get_device_capability(device)


def fits(dim: int, capability: tuple[int, int]) -> bool:
    """Whether a head's sums find room in registers."""
    return dim <= 128 or capability != (8, 0)


# Where reading the cache is predicted to take no longer than torch's attention in 16 bits at its tensor
# cores' full rate: benchmarks/compiled_kernels.py, docs/kernels/attention.md.
_FASTER = {(8, 0): (64, 128), (8, 9): (64, 96, 128, 256), (9, 0): (256,)}


def faster(dim: int, capability: tuple[int, int]) -> bool:
    """Whether a whole prompt, which torch's attention takes without a mask, is taken here instead."""
    return dim in _FASTER.get(capability, ())


def configuration(
    device: torch.device, rows: int, heads: int, length: int, dim: int, crowded: bool
) -> Config:
    """The tuned configuration, or the heuristic's; sizes are rounded up to powers of two."""
    rows, length = triton.next_power_of_2(rows), triton.next_power_of_2(length)
    return tuning.choose(
        "kv4_prefill",
        (min(rows, 4096), heads, length, dim, int(crowded)),
        candidates(rows),
        heuristic(rows, heads, length, dim, tuning.processors(device), capability(device), crowded),
        device,
    )


def candidates(rows: int) -> list[Config]:
    """Tiles, splits, stages and warps worth trying."""
    return [
        {"BM": m, "BN": n, "SPLIT": split, "num_warps": warps, "num_stages": stages}
        for m, warps in ((64, 4), (128, 8), (128, 4))
        for n in (32, 64, 128)
        for split in (SPLITS if rows <= 4096 else (1,))
        for stages in (2, 3)
    ]


def heuristic(
    rows: int,
    heads: int,
    length: int,
    dim: int,
    processors: int,
    capability: tuple[int, int] = (9, 0),
    crowded: bool = False,
) -> Config:
    """Two programs of four warps on a processor of Hopper, one of eight elsewhere; splits until all are busy.

    Args:
        crowded: a mask or FP8 weights take registers, too.
    """
    if capability[0] == 9 and dim <= 128:
        config = {"BM": 64, "BN": 64 if crowded else 128, "num_warps": 4, "num_stages": 2}
    elif capability[0] == 8 and dim > 128:
        config = {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 2}
    else:
        config = {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2}
    tiles = heads * triton.cdiv(rows, config["BM"])
    wanted = max(1, min(2 * processors // tiles, length // 512))
    return config | {"SPLIT": max(s for s in SPLITS if s <= wanted)}


def builds() -> Iterator[Build]:
    """Every head_dim and generation in the heuristic's configuration; FP8 weights; e4m3 scales; a mask."""
    for gpu in ((8, 0), (8, 9), (9, 0), (10, 0)):
        for dim in (64, 80, 96, 128, 256):
            if fits(dim, gpu):
                yield _build(dim, gpu)
        yield _build(128, gpu, mask=True)
        if gpu > (8, 0):
            yield _build(128, gpu, products="fp8")
    yield _build(128, (9, 0), scale8=True)
    for eight in (False, True):
        signature = dict.fromkeys(("T", "GROUP", "KV_HEADS"), "i32") | {"FACTOR": "fp32"}
        signature |= {"query": "*bf16", "post_scale": "*fp32", "factors": "*fp32"}
        signature |= dict.fromkeys(("q_batch", "q_head", "q_token"), "i64")
        signature["out"] = "*fp8e4nv" if eight else "*bf16"
        yield Build(
            f"kv4_prepare[{'e4m3' if eight else 'bf16'}]",
            prepare_kernel,
            signature,
            {"DIM": 128, "WIDTH": 128, "BR": 16, "POST": True, "ROUND": True, "QK8": eight,
             "INTERPRET": False},
            num_stages=1,
            capabilities=(89, 90, 100) if eight else (80, 89, 90, 100),
            wide_loads=False,
            tile={"elements": 16 * 128, "bytes": 16 * 128 * (3 if eight else 4)},
        )  # fmt: skip


def _build(
    dim: int,
    gpu: tuple[int, int],
    products: str = "exact",
    scale8: bool = False,
    mask: bool = False,
) -> Build:
    config = heuristic(4096, 64, 4096, dim, 132, gpu, mask or products == "fp8")
    eight, weights8 = gpu in ((8, 9), (9, 0)), products == "fp8"
    signature = dict.fromkeys(("T", "S", "GROUP", "KV_HEADS"), "i32")
    signature |= dict.fromkeys(("factors", "partial", "stats"), "*fp32")
    signature |= {"query": "*fp8e4nv" if eight else "*bf16", "out": "*bf16"}
    signature |= {"key": "*u8" if eight else "*i16", "value": "*u8" if weights8 else "*i16"}
    signature |= dict.fromkeys(("key_scale", "value_scale"), "*u8" if scale8 else "*i16")
    signature |= {"mask": "*u8", "length": "*i64"}
    names = ("key", "value", "scales", "mask")
    strides = [f"{name}_{part}" for name in names for part in ("batch", "head")] + ["mask_token"]
    signature |= dict.fromkeys(strides, "i64")
    constants = {
        "DIM": dim, "QK8": eight, "PV8": weights8, "BM": config["BM"], "BN": config["BN"], "SPLIT": 1,
        "CAUSAL": not mask, "WINDOW": 0, "MASK": int(mask), "LENGTH": True, "SCALE8": scale8,
        "PART8": 2 * _words(dim), "PART16": _words(dim), "INTERPRET": False, "scales_token": 1,
    }  # fmt: skip
    pointers = [n for n, kind in signature.items() if kind.startswith("*")]
    cores = {80: "HMMA", 89: "QMMA", 90: "QGMMA", 100: ".*MMA"}
    # Sums of 16-bit products count twice where the others are of 8 bits.
    each = (1 if eight else 2) + (1 if weights8 else 2) if eight or weights8 else 2
    what = f"{products}, " if weights8 else ""
    what += f"{'e4m3' if scale8 else 'bf16'} scale{', mask' if mask else ''}"
    return Build(
        f"kv4_prefill[D{dim}, {what}]",
        prefill_kernel,
        signature,
        constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        divisible=(*pointers, *strides),
        capabilities=(10 * gpu[0] + gpu[1],),
        tensor_core=cores,
        wide_loads=dim % 32 == 0 and dim > 64,
        shared=config["BN"] * dim,
        tile={
            "elements": config["BM"] * config["BN"],
            "bytes": 0,
            "operations": 2 * each * config["BM"] * config["BN"] * 4 * _words(dim),
        },
        shortest_loop=not mask,
    )
