"""An INT4 weight written out once, for products of so many rows that expanding it per tile costs more.

packed [BN, part] -> registers -> part i: code x scale, rounded -> [BN, part] of 16 or 8 bits
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from ..gpu_layout import inputs, unit
from .build import Build
from .casts import round_to
from .gemm import channel_scale, unit_factor
from .int4_operands import C_HALF, C_ROUNDED, HALF, ROUNDED, operand

_ROWS = 64  # of a tile


@triton.jit(do_not_specialize=["GROUPS"])
def expand_kernel(
    weight,
    scale,
    out,
    channels,
    N,
    K,
    GROUPS,
    weight_stride,
    scale_row,
    scale_group,
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS_PER_GROUP: tl.constexpr,
    BN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A unit of BN rows; for ROUNDED also the channels' scales, by the first unit's program."""
    PARTS: tl.constexpr = 4 if KIND == C_HALF else 2
    PART: tl.constexpr = UNIT // PARTS
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    step = tl.program_id(1)
    inside = row < N
    safe = tl.where(inside, row, 0).to(tl.int64)
    part = tl.arange(0, PART)
    w_at = weight + safe[:, None] * weight_stride + step * PART + part[None, :]
    s_at = scale + safe * scale_row
    channel = tl.full((BN,), 1.0, dtype=tl.float32)
    if KIND == C_ROUNDED:
        channel = channel_scale(s_at, scale_group, GROUPS, BN)
        if step == 0:
            tl.store(channels + row, channel, mask=inside)
    elif UNITS_PER_GROUP == 0:
        channel = tl.load(s_at).to(tl.float32)
    factor = unit_factor(s_at, scale_group, step, channel, UNITS_PER_GROUP, KIND)
    packed = tl.load(w_at)
    before = packed
    if INTERPRET and KIND == C_ROUNDED:
        before = tl.load(w_at + (tl.where(part % 4 == 0, 3, -1))[None, :])
    at = out + row.to(tl.int64)[:, None] * K + step * UNIT + part[None, :]
    for i in tl.static_range(PARTS):
        values = operand(packed, before, factor[:, None], dtype, KIND, i, INTERPRET)
        if KIND == C_HALF:
            wide = values.to(tl.float32) * factor[:, None]
            values = round_to(wide, dtype, INTERPRET).to(dtype)
        tl.store(at + i * PART, values, mask=inside[:, None])


def expand(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight [N, K] in `dtype` and what its rows are still to be multiplied by, float32 [N, 1].

    bf16 and fp16 (from "quarters"): q * scale rounded once, the second result is not meant to be read.
    e4m3 (from "signs"): e4m3(q * code / 8) with the row's scale / code = 8 x the second result.
    """
    n, k, groups = weight.shape[0], inputs(weight), scale.shape[1]
    size = unit(k // groups)
    assert size is not None
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    channels = torch.empty(n, 1, dtype=torch.float32, device=weight.device)
    expand_kernel[(triton.cdiv(n, _ROWS), k // size)](
        weight,
        scale,
        out,
        channels,
        n,
        k,
        groups,
        weight.stride(0),
        *scale.stride(),
        KIND=ROUNDED if dtype == torch.float8_e4m3fn else HALF,
        UNIT=size,
        UNITS_PER_GROUP=0 if groups == 1 else k // groups // size,
        BN=_ROWS,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return out, channels


def builds() -> Iterator[Build]:
    """To bf16 and to e4m3."""
    for name, kind, packed, written in (
        ("bf16", HALF, "*i16", "*bf16"),
        ("e4m3", ROUNDED, "*u8", "*fp8e4nv"),
    ):
        pointers = {"weight": packed, "scale": "*bf16", "out": written, "channels": "*fp32"}
        sizes = dict.fromkeys(("N", "K", "GROUPS"), "i32")
        strides = dict.fromkeys(("weight_stride", "scale_group"), "i64")
        constants = {
            "scale_row": 1, "KIND": kind, "UNIT": 128, "UNITS_PER_GROUP": 1, "BN": _ROWS,
            "INTERPRET": False,
        }  # fmt: skip
        yield Build(
            f"int4_expand[{name}]",
            expand_kernel,
            {**pointers, **sizes, **strides},
            constants,
            num_warps=4,
            divisible=(*pointers, "N", "K", *strides),
            capabilities=(80, 89, 90, 100) if kind == HALF else (89, 90, 100),
            tile={"elements": _ROWS * 128, "bytes": _ROWS * 128 * (2.5 if kind == HALF else 1.5)},
        )
