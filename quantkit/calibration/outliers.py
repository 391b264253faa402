"""How far a layer's outlier channels stand out, for the report: what smoothing and rotating are there to undo."""

from __future__ import annotations

import torch

from quantkit.calibration.statistics import InputStatistics
from quantkit.methods.hadamard import rotate


def outlier_ratio(absmax: torch.Tensor) -> float:
    """The largest channel over the median one; the largest such ratio of all heads if there are several.

    Args:
        absmax: float32 [K] or [heads, K], the largest magnitude of each channel.
    """
    median = absmax.median(-1).values.clamp_min(1e-30)
    return float((absmax.amax(-1) / median).max())


def input_outliers(
    stats: InputStatistics, factor: torch.Tensor | None, rotation: int | None
) -> dict[str, float]:
    """`outlier_ratio` of an input as it was, and of what is quantized: divided by the factor, then rotated.

    Both over the tokens that were kept, since a rotation's maxima cannot be had from the channels' own.
    """
    after = stats.rows if factor is None else stats.rows / factor
    after = rotate(after, rotation) if rotation else after
    return {
        "before": outlier_ratio(stats.rows.abs().amax(0)),
        "after": outlier_ratio(after.abs().amax(0)),
    }
