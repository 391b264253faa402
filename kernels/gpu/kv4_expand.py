"""INT4 keys and values back to 16 bits, and long prompts' attention over what comes out.

Expanding moves 2.5 bytes an element once; attention of hundreds of queries does hundreds of times that in
arithmetic, which torch's own kernels for 16 bits do at their full rate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from .build import Build
from .casts import from_e4m3_bits, round_to
from .kv4_append import typed_planes


@triton.jit
def expand_kernel(
    codes,
    scales,
    out,
    S,
    HEADS,
    codes_batch,
    codes_head,
    codes_token,
    scales_batch,
    scales_head,
    scales_token,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BT: tl.constexpr,
    FLOAT8: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """BT tokens of one head: out [B, H, S, D] = q * scale."""
    token = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    pair = tl.arange(0, HALF)
    inside = (token < S)[:, None] & (pair < DIM // 2)[None, :]
    at = (
        codes
        + batch * codes_batch
        + head * codes_head
        + token[:, None] * codes_token
        + pair[None, :]
    )
    packed = tl.load(at, mask=inside, other=0).to(tl.int32)
    at = scales + batch * scales_batch + head * scales_head + token * scales_token
    bits = tl.load(at, mask=token < S, other=0)
    if FLOAT8:
        scale = from_e4m3_bits(bits.to(tl.int32))[:, None]
    else:
        scale = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    low = ((packed & 15) - 8).to(tl.float32) * scale
    high = ((packed >> 4) - 8).to(tl.float32) * scale
    y = out + ((batch * HEADS + head) * S + token[:, None]) * DIM + pair[None, :]
    tl.store(y, round_to(low, dtype, INTERPRET).to(dtype), mask=inside)
    tl.store(y + DIM // 2, round_to(high, dtype, INTERPRET).to(dtype), mask=inside)


def expand(
    packed: torch.Tensor,
    head_dim: int,
    dtype: torch.dtype,
    planar: bool = False,
    length: int | None = None,
) -> torch.Tensor:
    """The first `length` tokens (all of them: None) of packed [B, H, S, P] -> [B, H, length, head_dim]."""
    batch, heads, size = packed.shape[:3]
    size = size if length is None else min(length, size)
    out = torch.empty((batch, heads, size, head_dim), dtype=dtype, device=packed.device)
    if not out.numel():
        return out
    codes, scales = typed_planes(packed, head_dim, planar)
    block = 16
    expand_kernel[(triton.cdiv(size, block), batch * heads)](
        *(codes, scales, out, size, heads, *codes.stride()[:3], *scales.stride()),
        DIM=head_dim,
        HALF=max(16, triton.next_power_of_2(head_dim // 2)),
        BT=block,
        FLOAT8=scales.dtype == torch.uint8,
        INTERPRET=interpreting(),
        num_warps=4,
    )
    return out


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool,
    length: int,
    window: int,
    planar: bool,
) -> torch.Tensor:
    """`kv4_attention` of a query that was prepared already, over the first `length` keys."""
    from ..kv4_attention import causal_mask

    tokens, dim = query.shape[2:]
    if mask is None and is_causal and (tokens < length or 0 < window < length):
        mask = causal_mask(tokens, length, query.device, window)
    if mask is not None:
        mask = mask[..., :length]
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        expand(key, dim, query.dtype, planar, length),
        expand(value, dim, query.dtype, planar, length),
        attn_mask=mask,
        is_causal=is_causal and mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if mask is not None and mask.dtype == torch.bool:
        # A row that sees nothing gives zeros, whatever torch's kernel of the day makes of it.
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.contiguous()


def builds() -> Iterator[Build]:
    """Sixteen tokens of a head, from planar caches."""
    parts = ("batch", "head", "token")
    signature = {"codes": "*u8", "out": "*bf16", "S": "i32", "HEADS": "i32"}
    signature |= {f"{n}_{part}": "i64" for n in ("codes", "scales") for part in parts}
    for dim in (64, 128, 256):
        for scales in ("*i16", "*u8"):
            yield Build(
                f"kv4_expand[D{dim}, {'bf16' if scales == '*i16' else 'e4m3'} scale]",
                expand_kernel,
                signature | {"scales": scales},
                {
                    "DIM": dim,
                    "HALF": dim // 2,
                    "BT": 16,
                    "FLOAT8": scales == "*u8",
                    "INTERPRET": False,
                },
                num_stages=1,
                divisible=("codes", "scales", "out", *(f"codes_{part}" for part in parts)),
                wide_loads=dim == 256,
                tile={"elements": 16 * dim, "bytes": 16 * dim * 2.5},
            )
