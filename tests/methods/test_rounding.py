import math

import pytest
import torch
from quantkit.kernels.cpu import native

from quantkit.methods.rounding import (
    Grid,
    absmax_scale,
    dequantize,
    expand,
    gaussian_scale,
    group,
    mse_scale,
    quantize,
    quantize_measured,
    store_bf16,
)

WEIGHT = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) ** 3


def nearest(x: float, scale: float, bits: int, half: bool) -> float:
    levels = [(q + 0.5 * half) * scale for q in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
    return min(levels, key=lambda level: abs(level - x))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_value_goes_to_its_nearest_level(bits: int, half: bool):
    grid = Grid(bits, half)
    scale = absmax_scale(WEIGHT, 64, grid)
    values = dequantize(quantize(WEIGHT, scale, grid), scale, grid)
    for row in range(4):
        for column in range(0, 256, 5):
            s = float(scale[row, column // 64])
            want = nearest(float(WEIGHT[row, column]), s, bits, half)
            assert abs(float(values[row, column]) - want) < 1e-5 * s


def test_ties_go_to_even():
    codes = Grid(4).encode(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 7.6, -9.0]), torch.tensor(1.0))
    assert codes.tolist() == [0, 2, 2, 0, -2, 7, -8]


def test_scales_of_zero_and_values_that_are_none():
    x = torch.tensor([3.0, 3.0, float("nan"), float("inf"), -float("inf")])
    scale = torch.tensor([0.0, float("nan"), 1.0, 1.0, 1.0])
    assert Grid(4).encode(x, scale).tolist() == [0, 0, 0, 7, -8]
    assert Grid(4, half=True).encode(torch.tensor([-0.2, 0.0, 9.0]), torch.ones(3)).tolist() == [
        -1,
        0,
        7,
    ]


@pytest.mark.parametrize(("bits", "half"), [(1, False), (0, True), (9, False)])
def test_grids_there_are_not(bits: int, half: bool):
    with pytest.raises(ValueError, match="bits must be"):
        Grid(bits, half)


def test_groups():
    assert torch.equal(group(WEIGHT, 64).reshape(16, 256), WEIGHT)
    assert group(WEIGHT, None).shape == (16, 1, 256)
    assert torch.equal(expand(torch.tensor([[1.0, 2.0]]), 4), torch.tensor([[1.0, 1.0, 2.0, 2.0]]))
    with pytest.raises(ValueError, match="256 inputs do not divide into groups of 100"):
        group(WEIGHT, 100)


def test_absmax_puts_the_largest_on_the_largest_level():
    scale = absmax_scale(WEIGHT, 64, Grid(4))
    assert torch.allclose(scale * 7, WEIGHT.view(16, 4, 64).abs().amax(-1))


def test_a_zero_group_is_harmless():
    weight = WEIGHT.clone()
    weight[:, :64] = 0
    for grid in (Grid(4), Grid(4, half=True)):
        scale = absmax_scale(weight, 64, grid)
        assert torch.all(scale > 0)
        assert (
            float(dequantize(quantize(weight, scale, grid), scale, grid)[:, :64].abs().max())
            < 1e-30
        )


def test_a_zero_group_leaves_its_rows_fp8_codes_alone():
    """FP8 codes are relative to the row's largest scale: a zero group must not be that."""
    weight = WEIGHT * 1e-3
    weight[:, :64] = 0
    weight[3] = 0
    scale = absmax_scale(weight, 64, Grid(4))
    others = scale[:, 1:].amax(1)
    assert torch.equal(scale[:, 0], others)
    assert torch.all(scale[3] > 0)


def test_clipping_is_never_worse_and_heeds_importance():
    importance = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 8
    grid = Grid(4)

    def error(scale: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        delta = dequantize(quantize(WEIGHT, scale, grid), scale, grid) - WEIGHT
        return (delta.square() * by).view(16, 4, 64).sum(-1)

    plain, clipped = absmax_scale(WEIGHT, 64, grid), mse_scale(WEIGHT, 64, grid)
    heeding = mse_scale(WEIGHT, 64, grid, importance)
    ones = torch.ones(256)
    assert torch.all(error(clipped, ones) <= error(plain, ones) * (1 + 1e-5))
    assert float(error(clipped, ones).sum()) < 0.9 * float(error(plain, ones).sum())
    assert torch.all(error(heeding, importance) <= error(clipped, importance) * (1 + 1e-5))
    assert float(error(heeding, importance).sum()) < 0.98 * float(error(clipped, importance).sum())


def test_gaussian_scale_is_quests_step():
    scale = gaussian_scale(WEIGHT, 64, Grid(4, half=True))
    rms = WEIGHT.view(16, 4, 64).square().mean(-1).sqrt()
    assert torch.allclose(scale, 2 * 2.51393 * rms / 15)


def test_stored_scales_are_bf16_and_positive():
    stored = store_bf16(torch.tensor([1.001, 1e-45, 3.4e38, 0.0]))
    assert torch.equal(stored, stored.bfloat16().float())
    assert torch.all((stored > 0) & torch.isfinite(stored))


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("group_size", [20, 64, None])
@pytest.mark.parametrize("grid", [Grid(3), Grid(4), Grid(4, half=True), Grid(8)], ids=str)
def test_the_native_search_finds_what_torch_finds(grid, group_size, importance, monkeypatch):
    if native.library() is None:
        pytest.skip("no native library on this machine")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 320, generator=generator) ** 3
    weight[2] = 0
    weight[3, 5] = torch.nan
    weight[4, 6] = torch.inf
    heed = torch.rand(320, generator=generator) if importance else None
    found = mse_scale(weight, group_size, grid, heed)
    monkeypatch.setattr(native, "library", lambda: None)
    want = mse_scale(weight, group_size, grid, heed)
    # Sums in another order may prefer the neighbouring ratio.
    assert torch.equal(found.isnan(), want.isnan())
    assert float((found.nan_to_num() == want.nan_to_num()).float().mean()) > 0.95
    torch.testing.assert_close(found, want, rtol=0.05, atol=0, equal_nan=True)


@pytest.mark.parametrize("group_size", [20, 64, None])
@pytest.mark.parametrize("grid", [Grid(3), Grid(4), Grid(4, half=True), Grid(8)], ids=str)
def test_codes_come_with_what_they_miss(grid, group_size, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 640, generator=generator)[:, ::2] ** 3
    weight[2] = 0
    weight[3, 5] = torch.nan
    scale = store_bf16(mse_scale(weight, group_size, grid))
    scale[4] = 0
    scale[5] = -1
    want = quantize(weight, scale, grid)
    usable = torch.arange(70)[torch.arange(70) != 3]
    error = dequantize(want, scale, grid)[usable] - weight[usable]
    for library in [native.library, lambda: None]:
        monkeypatch.setattr(native, "library", library)
        codes, lost, total = quantize_measured(weight, scale, grid)
        assert torch.equal(codes, want)
        assert math.isnan(lost)
        assert math.isnan(total)
        codes, lost, total = quantize_measured(weight[usable], scale[usable], grid)
        assert lost == pytest.approx(float(error.double().square().sum()), rel=1e-5)
        assert total == pytest.approx(float(weight[usable].double().square().sum()), rel=1e-5)
        # One scale for all rows, as torch broadcasts it.
        whole, each = scale[:1, :1], scale[:1, :1].expand(70, 1)
        assert torch.equal(quantize(weight, whole, grid), quantize(weight, each, grid))
    with pytest.raises(ValueError, match="divide"):
        quantize_measured(weight, scale.repeat(1, 3)[:, :7], grid)
