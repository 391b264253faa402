"""Rounding with learned offsets: each value may be moved across its rounding boundary, each scale may move a little.

Source: SignRound / AutoRound (Cheng et al., arXiv 2309.05516) for offsets learned through a straight-through
estimator, LSQ (Esser et al., arXiv 1902.08153) for the gradient of a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantkit.kernels.cpu import rounding as native
from quantkit.methods.rounding import Grid


def round_with_offset(target: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """`target` [N, K] on the levels of `scale` [N, G], each ratio moved by `offset` [N, K] before it is rounded.

    The value is level(nearest(target / scale + offset)) * scale, float32 [N, K]. Rounding counts as the
    identity in the backward pass, within the grid's range: d/d offset = scale, d/d scale = level - target / scale.

    Raises:
        ValueError: shapes do not fit.
    """
    rows, columns = target.shape
    if offset.shape != target.shape or scale.shape[0] != rows or columns % scale.shape[1]:
        raise ValueError(
            f"{list(target.shape)}, {list(scale.shape)} and {list(offset.shape)} do not fit together"
        )
    value: Tensor = _Rounding.apply(target, scale, offset, grid)  # type: ignore[no-untyped-call]
    return value


def encode_with_offset(target: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """The codes int8 [N, K] of `round_with_offset`."""
    shape = (*scale.shape, target.shape[1] // scale.shape[1])
    ratio = target.reshape(shape) / scale[..., None] + offset.reshape(shape)
    return grid.encode(ratio, torch.ones((), device=ratio.device)).reshape(target.shape)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(target, scale, offset)
        ctx.grid = grid
        value = native.round_with_offset(target, scale, offset, *grid.codes, grid.shift)
        if value is not None:
            return value
        shape = (*scale.shape, target.shape[1] // scale.shape[1])
        level, _, _ = _levels(target.view(shape), scale[..., None], offset.view(shape), grid)
        return level.mul_(scale[..., None]).view(target.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None]:
        target, scale, offset = ctx.saved_tensors
        grid = ctx.grid
        found = native.round_with_offset_backward(
            target, scale, offset, gradients[0].contiguous(), *grid.codes, grid.shift
        )
        if found is not None:
            by_offset, by_scale = found
            return None, by_scale, by_offset, None
        shape = (*scale.shape, target.shape[1] // scale.shape[1])
        wide, gradient = scale[..., None], gradients[0].reshape(shape)
        # Computed again rather than kept: a layer's levels are as large as its weights.
        level, ratio, inside = _levels(target.view(shape), wide, offset.view(shape), grid)
        by_scale = (gradient * level.sub_(ratio.mul_(inside))).sum(-1)
        by_offset = (gradient * inside).mul_(wide).view(target.shape)
        return None, by_scale, by_offset, None


def _levels(
    target: Tensor, scale: Tensor, offset: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """(levels, target / scale, whether the moved ratio lies within the grid)."""
    ratio = target / scale
    moved = ratio + offset
    nearest = moved.floor() if grid.half else moved.round()
    low, high = grid.codes
    inside = (nearest >= low) & (nearest <= high)
    level = nearest.clamp_(low, high)
    return level.add_(0.5) if grid.half else level, ratio, inside
