"""Grids, and the scales that place a weight on them.

A scale [N, G] belongs to a weight [N, K] cut into G groups of K / G consecutive inputs. A method first
chooses scales (`absmax_scale`, `mse_scale`, `gaussian_scale`), then rounds them to what the file stores
(`store_bf16`, or FP8 codes: fp8_scales.py), and rounds the weight against the *stored* scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.cpu import rounding as native
from quantkit.methods.quest import half_step

_TINY = torch.finfo(torch.bfloat16).tiny
_BF16_MAX = torch.finfo(torch.bfloat16).max
# Elements searched at a time: the passes over a chunk stay in the cache.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Grid:
    """The levels a number may take, in units of its scale.

    Codes are integers in [-2^(bits-1), 2^(bits-1) - 1]. On the integer grid a code q means q * scale;
    on the half-integer grid (QuEST, arXiv 2502.05003) a code n means (n + 1/2) * scale.

    Raises:
        ValueError: `bits` is not 1 to 8, or is 1 on the integer grid (which has no positive level then).
    """

    bits: int
    half: bool = False

    def __post_init__(self) -> None:
        least = 1 if self.half else 2
        if not least <= self.bits <= 8:
            raise ValueError(f"bits must be {least} to 8, not {self.bits}")

    @property
    def codes(self) -> tuple[int, int]:
        """The least and the largest code."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def shift(self) -> float:
        """From a code to its level, in units of the scale."""
        return 0.5 if self.half else 0.0

    @property
    def largest(self) -> float:
        """The largest positive level: 7 for INT4, 7.5 for the half grid at 4 bits."""
        return self.codes[1] + self.shift

    def encode(self, x: Tensor, scale: Tensor) -> Tensor:
        """The nearest codes, int8, in the shape of `x`; `scale` broadcasts against it.

        Ties go to even on the integer grid and up on the half grid. Where the scale is not positive, and
        for NaN, the code is 0.
        """
        return self.nearest(x, scale).to(torch.int8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The values of `codes`, float32; `scale` broadcasts against them."""
        return self.value(codes.float(), scale.float())

    def error(self, x: Tensor, scale: Tensor) -> Tensor:
        """Rounding errors x - decode(encode(x)), in floating point, in the shape of `x`."""
        return x - self.value(self.nearest(x, scale), scale)

    def nearest(self, x: Tensor, scale: Tensor) -> Tensor:
        """As `encode`, the codes in floating point."""
        ratio = _wide(x) / torch.where(scale > 0, scale, torch.inf)
        codes = ratio.floor_() if self.half else ratio.round_()
        return codes.clamp_(*self.codes).nan_to_num_(0.0)

    def value(self, codes: Tensor, scale: Tensor) -> Tensor:
        """As `decode`, of codes in floating point."""
        return (codes + self.shift if self.half else codes) * scale


def group(weight: Tensor, group_size: int | None) -> Tensor:
    """`weight` [N, K] as [N, G, K / G]; `group_size` None is one group of K.

    Raises:
        ValueError: K is not a multiple of the group size.
    """
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    if size < 1 or columns % size:
        raise ValueError(f"{columns} inputs do not divide into groups of {size}")
    return weight.reshape(rows, columns // size, size)


def expand(scale: Tensor, columns: int) -> Tensor:
    """`scale` [N, G] repeated to [N, columns].

    Raises:
        ValueError: `columns` is not a multiple of G.
    """
    groups = scale.shape[1]
    if groups < 1 or columns % groups:
        raise ValueError(f"{columns} inputs do not divide into {groups} groups")
    return scale.repeat_interleave(columns // groups, dim=1)


def absmax_scale(weight: Tensor, group_size: int | None, grid: Grid) -> Tensor:
    """Scales float32 [N, G] that put each group's largest magnitude of `weight` [N, K] on the largest level.

    Raises:
        ValueError: as `group`.
    """
    return _positive(group(weight, group_size).float().abs().amax(-1) / grid.largest, grid)


def mse_scale(
    weight: Tensor, group_size: int | None, grid: Grid, importance: Tensor | None = None
) -> Tensor:
    """Scales float32 [N, G] with the least squared rounding error on a grid of clipping ratios.

    Never worse than `absmax_scale`, whose ratio of 1 is the first tried.

    Args:
        weight: [N, K].
        group_size: inputs that share a scale; None for all K.
        grid: the levels.
        importance: [K], the weight of each input's error (mean x^2, or the Hessian's diagonal).

    Raises:
        ValueError: as `group`, or `importance` is not [K].
    """
    columns = weight.shape[1]
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance must have shape [{columns}], not {list(importance.shape)}")
    # Two or three bits clip much harder: fewer levels, and the bulk of a group is far below its maximum.
    ratios = torch.linspace(1.0, 0.5, 26) if grid.bits >= 4 else torch.linspace(1.0, 0.2, 41)
    if importance is not None:
        importance = importance.float()
    start = absmax_scale(weight, group_size, grid)
    best = native.scale_search(weight.float(), start, importance, ratios, *grid.codes, grid.shift)
    if best is not None:
        return best
    weights = None if importance is None else group(importance[None], group_size)
    chunk = max(1, _CHUNK // max(columns, 1))
    found = [
        _search(rows, first, group_size, grid, weights, ratios.tolist())
        for rows, first in zip(weight.split(chunk), start.split(chunk))
    ]
    return torch.cat(found)


def _search(
    weight: Tensor,
    start: Tensor,
    group_size: int | None,
    grid: Grid,
    importance: Tensor | None,
    ratios: list[float],
) -> Tensor:
    groups = group(weight, group_size).float()
    best = start.clone()
    least = torch.full_like(start, torch.inf)
    for ratio in ratios:
        scale = start * ratio
        error = grid.error(groups, scale[..., None]).square_()
        total = (error if importance is None else error.mul_(importance)).sum(-1)
        better = total < least
        best, least = torch.where(better, scale, best), torch.where(better, total, least)
    return best


def gaussian_scale(weight: Tensor, group_size: int | None, grid: Grid) -> Tensor:
    """Scales float32 [N, G] by QuEST's rule for Gaussian groups: 2 * A_b * rms / (2^b - 1).

    Source: QuEST, arXiv 2502.05003, with rms per group instead of per row.

    Raises:
        ValueError: as `group`.
    """
    return _positive(half_step(group(weight, group_size).float(), grid.bits).squeeze(-1), grid)


def quantize(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """`weight` [N, K] rounded to the nearest levels of `scale` [N, G]: codes int8 [N, K].

    Raises:
        ValueError: K is not a multiple of G.
    """
    groups, level = _by_group(weight, scale)
    found = native.round_to_nearest(weight, scale, *grid.codes, grid.shift)
    return found[0] if found is not None else grid.encode(groups, level).view(weight.shape)


def quantize_measured(weight: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, float, float]:
    """As `quantize`, with the sums of the squared errors and of the weight's squares.

    Raises:
        ValueError: K is not a multiple of G.
    """
    _by_group(weight, scale)
    found = native.round_to_nearest(weight, scale, *grid.codes, grid.shift)
    if found is not None:
        codes, sums = found
        lost, total = sums.sum(0).tolist()
        return codes, lost, total
    codes = quantize(weight, scale, grid)
    error = dequantize(codes, scale, grid).sub_(weight)
    return codes, float(error.square_().sum()), float(weight.square().sum())


def dequantize(codes: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The values float32 [N, K] of `codes` [N, K] under `scale` [N, G].

    Raises:
        ValueError: K is not a multiple of G.
    """
    groups, scale = _by_group(codes, scale)
    return grid.decode(groups, scale).view(codes.shape)


def _by_group(matrix: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] and [N, G] as [N, G, K / G] and [N, G, 1]: a scale is read once a group, not repeated in memory."""
    rows, columns = matrix.shape
    groups = scale.shape[1]
    if groups < 1 or columns % groups:
        raise ValueError(f"{columns} inputs do not divide into {groups} groups")
    return matrix.reshape(rows, groups, columns // groups), scale[..., None]


def store_bf16(scale: Tensor) -> Tensor:
    """`scale` rounded to bfloat16, never to zero, a subnormal or infinity; float32, any shape."""
    # Clamped after the rounding too: the largest float32 numbers round up to infinity.
    return scale.float().to(torch.bfloat16).float().clamp(_TINY, _BF16_MAX)


def _positive(scale: Tensor, grid: Grid) -> Tensor:
    """`scale` [N, G] with zeros (of all-zero groups) replaced by positive numbers that do no harm.

    On the integer grid any scale decodes to zero; the row's largest one leaves its FP8 codes alone. The half
    grid has no zero, so there the scale must be tiny.
    """
    if grid.half:
        return scale.clamp_min(_TINY)
    largest = scale.amax(1, keepdim=True)
    return torch.where(scale > 0, scale, torch.where(largest > 0, largest, 1.0))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
