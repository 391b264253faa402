import itertools

import pytest
import torch

from quantkit.methods.fp8_scales import store_fp8_channel
from quantkit.methods.rounding import Grid, absmax_scale, dequantize, quantize, store_bf16
from quantkit.methods.scale_fit import FP8_STRETCHES, fit_scales

GRID = Grid(4)


def problem(rows: int = 24, columns: int = 96, grid: Grid = GRID, group: int = 32):
    """Correlated inputs, a weight, codes rounded to nearest and their scales, unstored."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / 4 + torch.eye(columns)
    x = torch.randn(400, columns, generator=generator) @ mix
    weight = torch.randn(rows, columns, generator=generator)
    scale = absmax_scale(weight, group, grid)
    return weight, 2 * x.T @ x, scale


def error(weight, codes, scale, hessian, grid=GRID):
    """By definition, in float64: [N]."""
    d = (weight - dequantize(codes, scale, grid)).double()
    return ((d @ hessian.double()) * d).sum(1)


@pytest.mark.parametrize("grid", [GRID, Grid(4, half=True), Grid(2)])
def test_unstored_it_is_least_squares(grid: Grid):
    weight, hessian, scale = problem(grid=grid)
    codes = quantize(weight, scale, grid)
    found = fit_scales(weight, codes, scale, hessian, grid, lambda s: s, sweeps=200)
    root = torch.linalg.cholesky(hessian.double())
    levels = grid.decode(codes, torch.ones(())).double()
    for row in range(len(weight)):
        # One column per group: what the levels of that group alone give.
        parts = torch.zeros(3, 96, dtype=torch.float64)
        for g in range(3):
            parts[g, 32 * g : 32 * (g + 1)] = levels[row, 32 * g : 32 * (g + 1)]
        want = torch.linalg.lstsq((parts @ root).T, (weight[row].double() @ root)[:, None]).solution
        torch.testing.assert_close(found[row].double(), want[:, 0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("store", [store_bf16, store_fp8_channel])
def test_no_row_gets_worse_and_scales_are_stored(store):
    weight, hessian, scale = problem()
    scale = store(scale)
    codes = quantize(weight, scale, GRID)
    found = fit_scales(weight, codes, scale, hessian, GRID, store, stretches=FP8_STRETCHES)
    assert torch.equal(store(found), found)
    before, after = (error(weight, codes, s, hessian) for s in (scale, found))
    assert bool((after <= before * (1 + 1e-6)).all())
    assert float(after.sum() / before.sum()) < 0.95


def test_fp8_codes_and_channel_scale_are_chosen_together():
    """Against every combination of the codes near the best and channel scales near it."""
    weight, hessian, scale = problem(rows=4, columns=64)
    codes = quantize(weight, scale, GRID)
    free = fit_scales(weight, codes, scale, hessian, GRID, lambda s: s, sweeps=50)
    start = store_fp8_channel(free)
    found = fit_scales(
        weight, codes, start, hessian, GRID, store_fp8_channel, stretches=FP8_STRETCHES
    )
    steps = torch.linspace(0.85, 1.15, 61)
    every = torch.stack(
        [store_fp8_channel(free * torch.stack(pair)) for pair in itertools.product(steps, steps)]
    )
    least = torch.stack([error(weight, codes, s, hessian) for s in every]).amin(0)
    got, rounded = (error(weight, codes, s, hessian) for s in (found, start))
    assert bool((got <= rounded * (1 + 1e-6)).all())
    # Nearly all of what there is to gain is found.
    assert float((got - least).sum()) < 0.1 * float((rounded - least).sum())


def test_dead_groups_and_bad_shapes():
    weight, hessian, scale = problem()
    weight[:, :32] = 0
    hessian[32:64] = 0
    hessian[:, 32:64] = 0
    codes = quantize(weight, scale, GRID)
    found = fit_scales(weight, codes, scale, hessian, GRID, lambda s: s)
    assert torch.equal(found[:, :2], scale[:, :2])
    assert bool((found > 0).all())
    with pytest.raises(ValueError, match="Hessian"):
        fit_scales(weight, codes, scale, hessian[:5, :5], GRID, store_bf16)
    with pytest.raises(ValueError, match="do not fit"):
        fit_scales(weight, codes, scale[:3], hessian, GRID, store_bf16)
