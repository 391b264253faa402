"""FireQ's factors: channel-wise scaling of linears, and the RoPE-aware scaling of keys.

Source: arXiv 2505.20839. A linear's factor d [K] divides the activation and multiplies the weight's columns.
A key's factor multiplies the key and divides the query, so the scores stay as they are. RoPE in the
half-split layout turns channel i with its partner i + D/2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SCALE_RANGE = {
    torch.bfloat16: (torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max),
    torch.float8_e4m3fn: (2.0**-9, 448.0),
}


def constant_factor(weight_absmax: Tensor, constant: float) -> Tensor:
    """constant / absmax [K]: every column of the weight gets the same maximum. 1 for a column of zeros.

    Args:
        weight_absmax: [K], each column's largest magnitude (over all linears that share the input).
        constant: FireQ's script for Llama-3-8B has 0.0096 for gate and up, 0.015 for down.

    Raises:
        ValueError: the constant is not positive.
    """
    return _over(weight_absmax, constant)


def pair_magnitude(keys: Tensor) -> Tensor:
    """max_t sqrt(k_i^2 + k_(i+D/2)^2) of `keys` [..., T, D]: [..., D], alike on both members of a pair.

    A rotation does not change a pair's norm: keys before and after RoPE give the same.

    Raises:
        ValueError: D is odd.
    """
    first, second = _halves(keys.float())
    largest = torch.hypot(first, second).amax(-2)
    return torch.cat([largest, largest], -1)


def rope_pre_factor(pair_absmax: Tensor, alpha: float, strength: float = 1.0) -> Tensor:
    """a = (alpha / max_t sqrt(k_i^2 + k_(i+D/2)^2))^strength, for the rows of k_proj; its inverse for q_proj's.

    Args:
        pair_absmax: [H, D], as `pair_magnitude` gives it; the larger of two members counts for both.
        alpha: what each pair's largest norm becomes, at full strength.
        strength: FireQ's is 1; less leaves part of the difference between pairs, and queries more even.

    Returns:
        float32 [H, D], alike on both members of a pair, which is what lets it pass through RoPE. 1 where a
        key is always zero.

    Raises:
        ValueError: D is odd or alpha is not positive.
    """
    first, second = _halves(pair_absmax)
    largest = torch.maximum(first, second)
    return _over(torch.cat([largest, largest], -1), alpha).pow(strength)


def rope_post_factor(key_absmax: Tensor, beta: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Factors for rotated keys: beta / max_t |k_j| on the largest channels and their partners, else 1.

    Args:
        key_absmax: [H, D], each channel's largest magnitude after RoPE.
        beta: what those channels' maximum becomes.
        top_k: channels taken per head, before their partners are added; FireQ takes 3.

    Returns:
        b float32 [H, D], and taken bool [H, D]. Where a pre factor is used too, it is 1 where taken.

    Raises:
        ValueError: D is odd, beta is not positive, or there are no `top_k` channels.
    """
    _halves(key_absmax)
    size = key_absmax.shape[-1]
    if not 0 <= top_k <= size:
        raise ValueError(f"top_k must be 0 to {size}, the head's size, not {top_k}")
    taken = torch.zeros_like(key_absmax, dtype=torch.bool)
    taken.scatter_(-1, key_absmax.topk(top_k, -1).indices, True)
    taken |= taken.roll(size // 2, -1)
    return torch.where(taken, _over(key_absmax, beta), 1.0), taken


def kv4_fake_quantize(x: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """`x` [..., D] as the INT4 cache gives it back, float32: one signed scale per row, no zero point.

    The scale -x_m / 8, x_m the element of the largest magnitude, is rounded to its storage type first, then
    codes = clamp(round(x / scale), -8, 7): the sign gives x_m the code -8, and all sixteen codes are used.

    Args:
        x: keys (after RoPE) or values.
        scale_dtype: torch.bfloat16 or torch.float8_e4m3fn.

    Raises:
        ValueError: another scale type.
    """
    if scale_dtype not in _SCALE_RANGE:
        raise ValueError(f"a cache's scale is bfloat16 or float8_e4m3fn, not {scale_dtype}")
    x = x.float()
    lowest, highest = torch.aminmax(x, dim=-1, keepdim=True)
    magnitude = (torch.maximum(highest, -lowest) / 8).clamp(*_SCALE_RANGE[scale_dtype])
    scale = torch.where(highest > -lowest, -magnitude, magnitude).to(scale_dtype).float()
    return (x / scale).round().clamp(-8, 7) * scale


@torch.no_grad()
def attention_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factor: Tensor,
    scale_dtype: torch.dtype,
    *,
    quantize_query: bool = True,
    scaling: float | None = None,
) -> float:
    """Squared error of causal attention's output, keys and values in INT4 and queries in FP8 where asked.

    Args:
        query: [B, Hq, T, D] after RoPE.
        key, value: [B, H, T, D]; H divides Hq.
        factor: [H, D], on keys before they are rounded; queries are divided by it.
        scale_dtype: of the cache's scales.
        scaling: of the scores; 1 / sqrt(D) if left out.

    Raises:
        ValueError: as `kv4_fake_quantize`.
    """
    query, key, value = query.float(), key.float(), value.float()
    group = query.shape[1] // key.shape[1]
    factor = factor.float()[:, None]
    rounded_query = query / factor.repeat_interleave(group, 0)
    if quantize_query:
        scale = (rounded_query.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-30)
        rounded_query = (rounded_query / scale).to(torch.float8_e4m3fn).float() * scale
    rounded_key = kv4_fake_quantize(key * factor, scale_dtype)
    outputs = [
        nn.functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(group, 1),
            v.repeat_interleave(group, 1),
            is_causal=True,
            scale=scaling,
        )
        for q, k, v in (
            (query, key, value),
            (rounded_query, rounded_key, kv4_fake_quantize(value, scale_dtype)),
        )
    ]
    return float((outputs[1] - outputs[0]).square().sum(dtype=torch.float64))


def _over(absmax: Tensor, target: float) -> Tensor:
    """target / absmax in float32, 1 where that is no positive, finite number."""
    if not target > 0:
        raise ValueError(f"a factor's target must be positive, not {target}")
    factor = target / absmax.float()
    return torch.where(torch.isfinite(factor) & (factor > 0), factor, 1.0)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    size = x.shape[-1]
    if size % 2:
        raise ValueError(f"a head of {size} channels has no RoPE pairs")
    return x[..., : size // 2], x[..., size // 2 :]
