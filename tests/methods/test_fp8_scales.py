import pytest
import torch

from quantkit.methods.fp8_scales import (
    E4M3_MIN,
    split_fp8_channel,
    store_fp8_channel,
    store_fp8_tensor,
    tensor_power,
)
from quantkit.methods.rounding import Grid, absmax_scale, dequantize, quantize


def rows(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(500, 32, generator=generator) + 0.01
    if kind == "wide":
        scale = torch.exp(torch.randn(500, 32, generator=generator) * 6)
    elif kind == "tiny":
        scale *= 1e-30
    elif kind == "huge":
        scale *= 1e30
    elif kind == "one":
        scale = scale[:, :1]
    elif kind == "ends":
        scale = torch.tensor(
            [
                [3.4e38, 1.0, 1e-45],
                [2e-32, 7e-33, 3e-33],
                [1e-36, 1e-45, 1e-40],
                [1.0, 2.0**-17, 1e-30],
            ]
        )
    elif kind == "equal":
        scale = torch.full((500, 32), 0.0371)
    return scale


@pytest.mark.parametrize("kind", ["plain", "wide", "tiny", "huge", "one", "equal", "ends"])
def test_codes_and_channel_scale_come_back_bit_for_bit(kind: str):
    scale = rows(kind)
    stored = store_fp8_channel(scale)
    assert torch.equal(stored, stored.to(torch.bfloat16).float()), "what is stored is bf16"
    assert torch.all(torch.isfinite(stored) & (stored > 0))
    assert float(stored.amin()) >= torch.finfo(torch.bfloat16).tiny, (
        "no subnormals: kernels flush them"
    )
    assert torch.all(stored.amax(1) >= scale.amax(1).clamp_max(3e38) * (1 - 2**-8))
    codes, channel = split_fp8_channel(stored)
    assert torch.equal((codes.float() * channel).to(torch.bfloat16).float(), stored)
    assert torch.all(codes.float().amax(1) == 448)
    assert torch.all(codes.float() >= E4M3_MIN)
    top = channel * 448
    assert torch.allclose(top, top.to(torch.bfloat16).float(), rtol=1e-6), (
        "of a bf16 number, to float32's last bit"
    )
    again, same = split_fp8_channel(store_fp8_channel(stored))
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(same, channel)


def test_the_codes_are_the_nearest():
    """Against a search over all 127 positive e4m3 numbers."""
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scale = rows("plain")[:40]
    codes, channel = split_fp8_channel(store_fp8_channel(scale))
    for row in range(40):
        for column in range(32):
            ratio = float(scale[row, column]) / float(channel[row])
            best = float((every - ratio).abs().min())
            assert (
                abs(float(codes[row, column]) - ratio)
                <= best * 1.001 + 1e-6 * ratio + (ratio > 447) * 1.0
            )


def test_relative_error_is_that_of_four_bits():
    scale = rows("plain")
    assert float((store_fp8_channel(scale) / scale - 1).abs().max()) < 2**-4 * 1.05


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_the_tensor_variant(size: float):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * size
    grid = Grid(4)
    scale = absmax_scale(weight, 128, grid)
    stored = store_fp8_tensor(scale, weight)
    codes, channel = split_fp8_channel(stored)
    assert torch.equal((codes.float() * channel).to(torch.bfloat16).float(), stored)
    values = dequantize(quantize(weight, stored, grid), stored, grid)
    plain = dequantize(quantize(weight, scale, grid), scale, grid)
    assert float((values - weight).norm()) < 1.15 * float((plain - weight).norm())


@pytest.mark.parametrize("shrink", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(6))
def test_the_power_is_the_largest_that_fits(seed: int, shrink: float):
    """By trying every power of two, on every weight; `shrink` is a scale that clips."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 64, generator=generator) * float(torch.rand(1, generator=generator))
    scale = absmax_scale(weight, 16, Grid(4)) * shrink
    fits = []
    for power in (2.0**e for e in range(-5, 25)):
        s = (scale * power).clamp(2**-9, 448).to(torch.float8_e4m3fn).double()
        s = s.repeat_interleave(16, 1)
        q = (weight.double() * power / s).round().clamp(-8, 7)
        fits += [power] if float((q * s).abs().max()) <= 448 else []
    assert tensor_power(scale, weight) == max(fits)


def test_the_tensor_variant_of_weights_that_are_nothing():
    weight = torch.zeros(4, 32)
    stored = store_fp8_tensor(absmax_scale(weight, 16, Grid(4)), weight)
    assert torch.all(torch.isfinite(stored) & (stored > 0))
    with pytest.raises(ValueError, match="32 inputs do not divide into 3 groups"):
        store_fp8_tensor(torch.ones(4, 3), weight)
