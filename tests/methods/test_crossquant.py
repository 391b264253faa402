import pytest
import torch

from quantkit.methods.crossquant import (
    dynamic_scale,
    fake_quantize_dynamic,
    fold_factor,
    per_token_scale,
    zero_fraction,
)


@pytest.fixture
def x() -> torch.Tensor:
    """Activations with four outlier columns, as large models have them."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    x[:, [3, 40, 41, 90]] *= 50
    return x


@pytest.mark.parametrize("alpha", [0.0, 0.15, 1.0])
def test_the_scale_is_equation_4(x: torch.Tensor, alpha: float):
    scale = dynamic_scale(x, 8, alpha)
    for i in range(0, 64, 9):
        for j in range(0, 96, 7):
            t, c = float(x[i].abs().max()), float(x[:, j].abs().max())
            assert float(scale[i, j]) == pytest.approx(t**alpha * c ** (1 - alpha) / 127, rel=1e-5)


def test_alpha_one_is_per_token(x: torch.Tensor):
    assert torch.allclose(dynamic_scale(x, 8, 1.0), per_token_scale(x, 8).expand_as(x))


def test_zero_fraction_counts_nonzero_values_that_are_lost(x: torch.Tensor):
    x[:10] = 0
    scale = per_token_scale(x, 8).expand_as(x)
    lost = alive = 0
    for i in range(64):
        for j in range(96):
            value = float(x[i, j])
            alive += value != 0
            lost += value != 0 and round(value / float(scale[i, j])) == 0
    assert zero_fraction(x, scale) == pytest.approx(lost / alive, abs=1e-3)


def test_fewer_values_are_lost_than_per_token(x: torch.Tensor):
    before = zero_fraction(x, per_token_scale(x, 8).expand_as(x))
    after = zero_fraction(x, dynamic_scale(x, 8, 0.15))
    d = fold_factor(x.abs().amax(0), 0.15)
    folded = zero_fraction(x / d, per_token_scale(x / d, 8).expand_as(x))
    assert before > 0.2
    assert after < 0.1 * before
    assert folded < 0.1 * before

    def error(y: torch.Tensor) -> float:
        return float((y - x)[:, :3].norm())

    assert error(fake_quantize_dynamic(x, 8, 0.15)) < 0.1 * error(fake_quantize_dynamic(x, 8, 1.0))


def test_folding_takes_the_columns_share_out(x: torch.Tensor):
    """d is c^(1 - alpha) up to one factor for all, and harmless where a column is dead."""
    x[:, 7] = 0
    d = fold_factor(x.abs().amax(0), 0.15)
    assert float(d[7]) == 1
    want = x.abs().amax(0) ** 0.85
    ratio = (d / want)[torch.arange(96) != 7]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4)
    with pytest.raises(ValueError, match="alpha"):
        fold_factor(x.abs().amax(0), 1.5)
