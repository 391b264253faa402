"""QuEST's forward quantizer: a half-integer grid clipped at the Gaussian optimum (arXiv 2502.05003).

The grid at b bits has the 2^b values (n + 1/2) * step, n in [-2^(b-1), 2^(b-1) - 1]: no zero, symmetric.
Its outermost values are +-A_b * rms, so step = 2 * A_b * rms / (2^b - 1). QuEST trains with it; here it
rounds trained weights and activations, after a Hadamard rotation has made them close to Gaussian.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A_b: the clipping factor with the least squared error for a standard normal variable.
GAUSSIAN_CLIP: dict[int, float] = {
    1: 0.79788,
    2: 1.49353,
    3: 2.05107,
    4: 2.51393,
    5: 2.91609,
    6: 3.27660,
    7: 3.60105,
    8: 3.88494,
}
_TINY = torch.finfo(torch.float32).tiny


def half_step(x: Tensor, bits: int, dim: int = -1) -> Tensor:
    """The step of the half-integer grid for each slice of `x` along `dim`.

    Args:
        x: any floating type; float32 maths (float64 for float64 input).
        bits: 1 to 8.
        dim: the dimension that shares a step; kept, with length 1.

    Returns:
        2 * A_b * rms / (2^b - 1). All-zero slices get the smallest normal number: the grid has no zero,
        so only a tiny step decodes to (almost) zero.

    Raises:
        ValueError: no clipping factor is known for `bits`.
    """
    if bits not in GAUSSIAN_CLIP:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    x = x if x.dtype == torch.float64 else x.float()
    rms = x.square().mean(dim, keepdim=True).sqrt()
    return (rms * (2 * GAUSSIAN_CLIP[bits] / (2**bits - 1))).clamp_min(_TINY)


def quantize_half(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [..., K] and step [..., 1] of `x` [..., K], one step per row.

    The nearest level of a half-integer grid is floor(x / step) + 1/2, clamped.

    Raises:
        ValueError: as `half_step`.
    """
    step = half_step(x, bits)
    codes = (x / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.to(torch.int8), step


def fake_quantize(x: Tensor, bits: int) -> Tensor:
    """`x` [..., K] rounded to its row's half-integer grid, as float32 (float64 for float64 input).

    Raises:
        ValueError: as `half_step`.
    """
    codes, step = quantize_half(x, bits)
    return (codes.to(step.dtype) + 0.5) * step
