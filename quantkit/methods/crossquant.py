"""CrossQuant: activation scales from the row's and the column's maximum.

Source: arXiv 2410.07505, equations 4 and 5. A column whose maximum is small gets a smaller scale than its
row alone would give it, so fewer elements round to zero: the paper's quantization kernel, here
`zero_fraction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.methods.rounding import Grid
from quantkit.methods.smoothing import normalise


def per_token_scale(x: Tensor, bits: int) -> Tensor:
    """Scales [T, 1] of `x` [T, K] by the row's maximum: t_i / (2^(b-1) - 1). Zero for a row of zeros."""
    return _wide(x).abs().amax(-1, keepdim=True) / Grid(bits).largest


def dynamic_scale(x: Tensor, bits: int, alpha: float) -> Tensor:
    """Scales [T, K] of `x` [T, K]: t_i^alpha * c_j^(1-alpha) / (2^(b-1) - 1).

    t_i is the row's largest magnitude and c_j the column's, over these very rows; alpha = 1 is per token,
    alpha = 0 per channel. Zero in rows and columns of zeros.

    Raises:
        ValueError: alpha is outside [0, 1].
    """
    _check(alpha)
    magnitude = _wide(x).abs()
    rows, columns = magnitude.amax(-1, keepdim=True), magnitude.amax(-2, keepdim=True)
    return rows.pow(alpha) * columns.pow(1 - alpha) / Grid(bits).largest


def fake_quantize_dynamic(x: Tensor, bits: int, alpha: float) -> Tensor:
    """`x` [T, K] rounded on the scales of `dynamic_scale`, float32.

    For evaluation: a scale along the reduced dimension cannot leave an integer product.

    Raises:
        ValueError: alpha is outside [0, 1].
    """
    grid, scale = Grid(bits), dynamic_scale(x, bits, alpha)
    return grid.decode(grid.encode(x, scale), scale)


def fold_factor(column_absmax: Tensor, alpha: float) -> Tensor:
    """c^(1-alpha), the part of the scale that is folded out of the activation and into the weight.

    The factor divides the activation and multiplies the weight's column; the activation is then quantized
    per token. Normalised: geometric mean 1, dead columns 1.

    Args:
        column_absmax: c [K], each column's largest magnitude in calibration.
        alpha: the row's share; 1 folds nothing.

    Raises:
        ValueError: alpha is outside [0, 1].
    """
    _check(alpha)
    absmax = _wide(column_absmax)
    # 0^0 is 1 and would count as alive.
    return normalise(torch.where(absmax > 0, absmax.pow(1 - alpha), 0.0))


def zero_fraction(x: Tensor, scale: Tensor) -> float:
    """The share of the nonzero elements of `x` that round to zero on `scale` (which broadcasts); 0 if none."""
    alive = x != 0
    ratio = _wide(x) / torch.where(scale > 0, scale, torch.inf)
    lost = alive & (ratio.round() == 0)
    return float(lost.sum()) / max(int(alive.sum()), 1)


def _check(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], not {alpha}")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
