"""The linear layers on a GPU: which kernel in which configuration, its launch, its workspace.

Up to 64 rows a product is bound by the weight's bytes: a tile of all the rows, K split until there are
programs enough. Beyond, by arithmetic: large tiles; where the weight can be rounded, it is expanded once
(`int4_expand`) and multiplied whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton

from .. import gpu_layout
from ..dispatch import interpreting
from . import tuning
from .build import Build
from .gemm import gemm_kernel
from .int4_expand import expand
from .int4_operands import DENSE, FACTORS, FLOAT8, HALF, HALF_INTEGER, INTEGER, ROUNDED

Config = dict[str, int]
SPLITS = (1, 2, 4, 8, 16)
DECODE_ROWS = 64
LARGEST_TILE = 128
# From here on a dense product of the expanded weight is taken to be faster than expanding tiles.
EXPAND_ROWS = {torch.bfloat16: 1024, torch.float16: 1024, torch.float8_e4m3fn: 128}
_UNIT_8BIT = 128


def int4(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    half_integer: bool = False,
    products: str = "exact",
    residual: torch.Tensor | None = None,
    gate: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """row_scale * (x @ w^T) + bias, with `gate` silu(first half) * second half, + residual.

    Args:
        op: whose tuned configurations are looked up.
        x: [..., K] bf16, fp16, e4m3 or int8; int8 is n + 1/2 where `half_integer`.
        weight, scale: from `gpu_layout.repack` for this x's type.
        row_scale: float32 [..., 1] or None.
        bias: [N] or None.
        products: "exact": group scales on float32 sums; "fp8": e4m3(q * scale), see `int4_fp8_linear`.
        residual: [..., N] (with `gate` [..., N / 2]), added to the rounded output; or None.
        gate: rows [0, N / 2) of the weight are a gate, the others the values that it multiplies.
        config: instead of the tuned one.

    Returns:
        [..., N] or, with `gate`, [..., N / 2].
    """
    rows = x.reshape(-1, x.shape[-1])
    if config is None and _expands(rows, weight, products):
        dense, channels = expand(weight, scale, x.dtype)
        if products == "fp8":
            # The dense product brings the codes' 8 back through its scale.
            return eight_bit(
                op, x, dense, channels * 8, row_scale, bias, out_dtype, residual=residual, gate=gate
            )
        return _sixteen_bit(x, dense, bias, residual, gate)
    kind = HALF_INTEGER if half_integer else INTEGER
    if weight.dtype == torch.uint8:
        kind = ROUNDED if products == "fp8" else FLOAT8
    elif weight.dtype == torch.int16:
        kind = HALF
        if x.dtype == torch.float8_e4m3fn:
            rows = _as_bf16(rows)
    size = gpu_layout.unit(rows.shape[1] // scale.shape[1])
    assert size is not None
    return _launch(
        kind, op, rows, weight, scale, row_scale, bias, residual, gate, size, config,
        (*x.shape[:-1], len(weight)), out_dtype,
    )  # fmt: skip


def eight_bit(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    residual: torch.Tensor | None = None,
    gate: bool = False,
    config: Config | None = None,
) -> torch.Tensor:
    """The same for x [..., K] and weight [N, K] both int8 (the sums are exact) or both e4m3.

    Args:
        scale: [N, 1], one per output channel.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _launch(
        DENSE, op, rows, weight, scale, row_scale, bias, residual, gate, _UNIT_8BIT, config,
        (*x.shape[:-1], len(weight)), out_dtype,
    )  # fmt: skip


def _expands(rows: torch.Tensor, weight: torch.Tensor, products: str) -> bool:
    if weight.dtype == torch.uint8 and products != "fp8":
        return False
    if weight.dtype == torch.int16 and rows.dtype == torch.float8_e4m3fn:
        return False
    return len(rows) >= EXPAND_ROWS.get(rows.dtype, 1 << 62)


def _sixteen_bit(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: bool,
) -> torch.Tensor:
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if gate:
        first, second = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(first) * second
    return y if residual is None else y + residual


def _as_bf16(rows: torch.Tensor) -> torch.Tensor:
    """e4m3 as bf16: exact, since it has fewer bits."""
    if not gpu_layout.has_fp8(rows.device):
        warnings.warn(
            "this GPU has no FP8 (compute capability below 8.9): FP8 activations are multiplied in bf16, "
            "with the same result but no gain in speed",
            stacklevel=2,
        )
    return rows.to(torch.bfloat16)


def _launch(
    kind: int,
    op: str,
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: bool,
    size: int,
    config: Config | None,
    shape: tuple[int, ...],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    (m, k), n, groups = rows.shape, len(weight), scale.shape[1]
    shape = (*shape[:-1], n // 2) if gate else shape
    y = torch.empty(shape, dtype=out_dtype, device=rows.device)
    if not y.numel():
        return y
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    chosen = config or configuration(op, kind, rows.device, m, n, k, size)
    split, units = chosen["SPLIT"], triton.cdiv(k, size)
    tiles = triton.cdiv(n, chosen["BN"]) * triton.cdiv(m, chosen["BM"])
    partial, tickets = _workspace(rows.device, tiles, chosen)
    gemm_kernel[(tiles, split)](
        rows,
        weight,
        scale,
        scale if row_scale is None else row_scale.contiguous(),
        scale if bias is None else bias.contiguous(),
        y if residual is None else residual.contiguous(),
        y,
        partial,
        tickets,
        m,
        n,
        k,
        groups,
        triton.cdiv(units, split),
        FACTORS[kind],
        rows.stride(0),
        weight.stride(0),
        *scale.stride(),
        KIND=kind,
        ROW_SCALE=row_scale is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        GATE=gate,
        UNIT=size,
        UNITS_PER_GROUP=0 if groups == 1 else k // groups // size,
        WHOLE_K=k % size == 0,
        INTERPRET=interpreting(),
        **chosen,
    )
    return y


def candidates(kind: int, m: int, largest: int = LARGEST_TILE) -> list[Config]:
    """Tiles, splits, stages and warps worth trying for m rows; `largest` as in `heuristic`."""
    if m <= DECODE_ROWS:
        tile_m = _tile_m(m)
        return [
            {"BN": n, "BM": tile_m, "SPLIT": split, "num_warps": warps, "num_stages": stages}
            for n in (64, 128)
            for split in SPLITS
            for stages in (3, 4, 5, 6)
            for warps in (4, 8)
            if warps == 4 or n == 128
        ]
    tiles = [(128, 64, 4), (128, 64, 8), (128, 128, 8)]
    if kind == DENSE:
        tiles += [(128, 256, 8), (256, 128, 8)]
    return [
        {"BN": n, "BM": tile_m, "SPLIT": split, "num_warps": warps, "num_stages": stages}
        for n, tile_m, warps in tiles
        if largest == LARGEST_TILE or tile_m <= largest
        for split in (1, 2, 4)
        for stages in (3, 4)
    ]


def heuristic(
    kind: int, m: int, n: int, k: int, size: int, processors: int, largest: int = LARGEST_TILE
) -> Config:
    """The configuration taken where none was measured; `largest`: rows of a tile, see `largest_tile`."""
    units = triton.cdiv(k, size)
    if m <= DECODE_ROWS:
        tile_m = _tile_m(m)
        tiles = triton.cdiv(n, 128)
        # Nearly two programs for each processor, of at least four units each: fewer only fill the pipeline.
        split = max(s for s in SPLITS if s == 1 or units >= 4 * s)
        split = next((s for s in SPLITS if s < split and tiles * s >= 1.9 * processors), split)
        # The sums of 64 rows fill the registers of four warps.
        warps = 8 if tile_m == 64 else 4
        stages = 4 if tile_m == 64 or kind == HALF else 5
        return {"BN": 128, "BM": tile_m, "SPLIT": split, "num_warps": warps, "num_stages": stages}
    tile_m = largest
    tiles = triton.cdiv(n, 128) * triton.cdiv(m, tile_m)
    split = max(s for s in (1, 2, 4) if s == 1 or (tiles * s <= processors and units >= 8 * s))
    return {"BN": 128, "BM": tile_m, "SPLIT": split, "num_warps": 8, "num_stages": 3}


def largest_tile(kind: int, capability: int) -> int:
    """Rows of a tile at prefill.

    Triton 3.6 compiles 16-bit tiles of 128 rows for compute capability 10 to a trap and nothing else.
    """
    return 64 if kind == HALF and capability >= 10 else LARGEST_TILE


def _tile_m(m: int) -> int:
    # 8 rows would save the sums of the others, but older Tritons take no wgmma for them.
    return max(16, triton.next_power_of_2(m))


def configuration(
    op: str, kind: int, device: torch.device, m: int, n: int, k: int, size: int
) -> Config:
    """The tuned configuration for this op and these sizes, or the heuristic's."""
    bucket = triton.next_power_of_2(m)
    processors = tuning.processors(device)
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    largest = largest_tile(kind, major)
    return tuning.choose(
        op,
        (bucket, n, k),
        candidates(kind, bucket, largest),
        heuristic(kind, bucket, n, k, size, processors, largest),
        device,
    )


_WORKSPACES: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}
# Outgrown workspaces stay: a recorded CUDA graph may still write to them.
_KEPT: list[tuple[torch.Tensor, torch.Tensor]] = []


def _workspace(
    device: torch.device, tiles: int, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and tickets (zeros, which a launch leaves as it found them), kept per stream."""
    splits = config["SPLIT"]
    sums = tiles * splits * config["BN"] * config["BM"] if splits > 1 else 1
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _WORKSPACES.get((device, stream))
    if found is None or found[0].numel() < sums or found[1].numel() < tiles:
        # Twice what is asked for, and no less than decoding needs: it should not grow often.
        partial = torch.empty(max(1 << 20, 2 * sums), dtype=torch.float32, device=device)
        tickets = torch.zeros(max(4096, 2 * tiles), dtype=torch.int32, device=device)
        found = _WORKSPACES[device, stream] = (partial, tickets)
        _KEPT.append(found)
    return found


_TYPES = {HALF: ("*bf16", "*i16"), FLOAT8: ("*fp8e4nv", "*u8"), ROUNDED: ("*fp8e4nv", "*u8"),
          INTEGER: ("*i8", "*i8"), HALF_INTEGER: ("*i8", "*i8"), DENSE: ("*i8", "*i8")}  # fmt: skip
_SIXTEEN_BIT_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: ".*MMA"}
_FP8_CORES = {89: "QMMA", 90: "QGMMA", 100: ".*MMA"}
_INT8_CORES = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: ".*MMA"}


def builds() -> Iterator[Build]:
    """The heuristic's configurations for every kind of activation, at decode and at prefill."""
    names = {HALF: "bf16", FLOAT8: "fp8", INTEGER: "int8", HALF_INTEGER: "half", ROUNDED: "rounded"}
    for kind, name in names.items():
        for m in (16, 32, 64) if kind == ROUNDED else (16, 32, 64, 2048):
            build = _build(f"int4_gemm[{name}, M{m}]", kind, _TYPES[kind], m, groups=True)
            if m > DECODE_ROWS and largest_tile(kind, 10) < LARGEST_TILE:
                build = replace(build, capabilities=(80, 89, 90))
            yield build
    yield _build(
        "int4_gemm[bf16, M2048, 10.0]", HALF, _TYPES[HALF], 2048, groups=True, capability=10
    )
    yield _build("int4_gemm[fp16, M16]", HALF, ("*fp16", "*i16"), 16, groups=True)
    yield _build("int4_gemm[fp8, M16, gate]", FLOAT8, _TYPES[FLOAT8], 16, groups=True, gate=True)
    yield _build(
        "int4_gemm[fp8, M2048, gate]", FLOAT8, _TYPES[FLOAT8], 2048, groups=True, gate=True
    )
    for kind, m in ((FLOAT8, 16), (FLOAT8, 2048), (HALF, 64), (HALF_INTEGER, 2048)):
        name = f"int4_gemm[{names[kind]}, M{m}, residual]"
        yield _build(name, kind, _TYPES[kind], m, groups=True, residual=True)
    yield _build(
        "int8_gemm[M2048, residual]", DENSE, _TYPES[DENSE], 2048, groups=False, residual=True
    )
    for kind in (FLOAT8, INTEGER):
        for m in (16, 2048):
            name = f"int4_gemm[{names[kind]} per channel, M{m}]"
            yield _build(name, kind, _TYPES[kind], m, groups=False)
    for m in (16, 64, 2048):
        yield _build(f"int8_gemm[M{m}]", DENSE, _TYPES[DENSE], m, groups=False)
    yield _build("fp8_gemm[M2048]", DENSE, ("*fp8e4nv", "*fp8e4nv"), 2048, groups=False)


def _build(
    name: str,
    kind: int,
    types: tuple[str, str],
    m: int,
    groups: bool,
    gate: bool = False,
    residual: bool = False,
    capability: int = 9,
) -> Build:
    size, k = 128, 4096
    config = heuristic(kind, m, 4096, k, size, 132, largest_tile(kind, capability))
    signature = dict.fromkeys(("M", "N", "K", "GROUPS", "STEPS"), "i32")
    signature |= dict.fromkeys(("x_stride", "weight_stride", "scale_row", "scale_group"), "i64")
    signature |= {
        "x": types[0], "weight": types[1], "scale": "*bf16", "row_scale": "*fp32", "bias": "*bf16",
        "residual": "*bf16", "y": "*bf16", "partial": "*fp32", "tickets": "*i32", "FACTOR": "fp32",
    }  # fmt: skip
    constants = {
        "KIND": kind, "ROW_SCALE": kind != HALF, "BIAS": False, "RESIDUAL": residual, "GATE": gate,
        "UNIT": size, "UNITS_PER_GROUP": int(groups), "WHOLE_K": True, "INTERPRET": False,
        "BN": config["BN"], "BM": config["BM"], "SPLIT": config["SPLIT"], "scale_row": 1,
    }  # fmt: skip
    del signature["scale_row"]
    weights = config["BN"] * size * (8 if kind == DENSE else 4) // 8
    inputs = config["BM"] * size * (2 if kind == HALF else 1)
    cores = (
        _INT8_CORES
        if types[0] == "*i8"
        else _FP8_CORES
        if "fp8" in types[0]
        else _SIXTEEN_BIT_CORES
    )
    divisible = [n for n, kind in signature.items() if kind.startswith("*")]
    return Build(
        name,
        gemm_kernel,
        signature,
        constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        divisible=(*divisible, "N", "K", "x_stride", "weight_stride", "scale_group"),
        capabilities=(100,)
        if capability == 10
        else (89, 90, 100)
        if "fp8" in types[0]
        else (80, 89, 90, 100),
        tensor_core=cores,
        shared=(config["num_stages"] - 1) * (weights + inputs),
        tile={
            "elements": config["BN"] * size,
            "bytes": weights,
            "operations": 2 * config["BM"] * config["BN"] * size,
        },
    )
