import pytest
import torch

from quantkit.methods.learned_rounding import encode_with_offset, round_with_offset
from quantkit.methods.rounding import Grid, absmax_scale, dequantize, quantize

GRIDS = [Grid(4), Grid(4, half=True), Grid(8)]


def problem():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 32, generator=generator)
    offset = torch.rand(6, 32, generator=generator) - 0.5
    return target, 0.7 * absmax_scale(target, 8, Grid(4)), offset


def slow(target, scale, offset, grid):
    """A value at a time: (value, d value / d offset, d value / d scale)."""
    out = torch.empty(3, *target.shape)
    width = target.shape[1] // scale.shape[1]
    for n in range(target.shape[0]):
        for k in range(target.shape[1]):
            s = float(scale[n, k // width])
            moved = float(target[n, k]) / s + float(offset[n, k])
            level = float(torch.tensor(moved).floor() if grid.half else torch.tensor(moved).round())
            low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
            inside = low <= level <= high
            level = min(max(level, low), high) + (0.5 if grid.half else 0.0)
            ratio = float(target[n, k]) / s
            out[:, n, k] = torch.tensor([level * s, s * inside, level - ratio * inside])
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_and_gradients_are_those_of_each_value_alone(grid: Grid):
    target, scale, offset = problem()
    value, by_offset, by_scale = slow(target, scale, offset, grid)
    scale, offset = scale.requires_grad_(), offset.requires_grad_()
    got = round_with_offset(target, scale, offset, grid)
    assert torch.allclose(got, value, atol=1e-6)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward()
    assert torch.allclose(offset.grad, by_offset * weight, atol=1e-6)
    assert torch.allclose(scale.grad, (by_scale * weight).view(6, 4, 8).sum(-1), atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_and_values_agree(grid: Grid):
    target, scale, offset = problem()
    codes = encode_with_offset(target, scale, offset, grid)
    value = round_with_offset(target, scale, offset, grid)
    assert torch.allclose(dequantize(codes, scale, grid), value, atol=1e-6)
    nothing = torch.zeros_like(offset)
    assert torch.equal(
        encode_with_offset(target, scale, nothing, grid), quantize(target, scale, grid)
    )


def test_shapes_are_checked():
    target, scale, offset = problem()
    with pytest.raises(ValueError, match="fit together"):
        round_with_offset(target, scale[:, :3], offset, Grid(4))
    with pytest.raises(ValueError, match="fit together"):
        round_with_offset(target, scale, offset[:, :8], Grid(4))
