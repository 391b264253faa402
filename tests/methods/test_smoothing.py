import pytest
import torch

from quantkit.methods.crossquant import per_token_scale
from quantkit.methods.rounding import Grid, absmax_scale, dequantize, quantize
from quantkit.methods.smoothing import (
    awq_factor,
    balance_factor,
    normalise,
    search,
    smoothquant_factor,
)

A = torch.tensor([0.5, 2.0, 8.0])
W = torch.tensor([4.0, 1.0, 0.25])


def same_up_to_a_factor(d: torch.Tensor, want: list[float]) -> bool:
    ratio = d / torch.tensor(want)
    return bool(torch.allclose(ratio, ratio[0].expand_as(ratio)))


def test_the_formulas():
    assert same_up_to_a_factor(awq_factor(A, 0.5), [a**0.5 for a in (0.5, 2, 8)])
    assert same_up_to_a_factor(
        smoothquant_factor(A, W, 0.3), [a**0.3 / w**0.7 for a, w in ((0.5, 4), (2, 1), (8, 0.25))]
    )
    assert same_up_to_a_factor(
        balance_factor(A, W), [(a / w) ** 0.5 for a, w in ((0.5, 4), (2, 1), (8, 0.25))]
    )


def test_normalised_and_safe():
    d = normalise(torch.tensor([1.0, 4.0, 0.0, float("nan"), float("inf"), 16.0]))
    assert d[2:5].tolist() == [1.0, 1.0, 1.0]
    assert float(d[[0, 1, 5]].log().sum()) == pytest.approx(0, abs=1e-6)
    assert normalise(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert float(awq_factor(torch.tensor([0.0, 1.0, 2.0]), 0.0)[0]) == 1.0


def test_extremes_are_clamped():
    d = normalise(torch.tensor([1e-30, 1.0, 1.0, 1.0, 1e30]))
    assert d.tolist() == pytest.approx([1e-4, 1.0, 1.0, 1.0, 1e4])


def rounders():
    def activation(x: torch.Tensor) -> torch.Tensor:
        scale = per_token_scale(x, 8)
        return (x / scale).round() * scale

    def weight(w: torch.Tensor) -> torch.Tensor:
        grid = Grid(8)
        scale = absmax_scale(w, None, grid)
        return dequantize(quantize(w, scale, grid), scale, grid)

    return activation, weight


def test_the_search_takes_the_least_joint_error():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(100, 64, generator=generator), torch.randn(32, 64, generator=generator)
    x[:, 5] *= 60
    w[:, 5] /= 60
    candidates = [
        smoothquant_factor(x.abs().amax(0), w.abs().amax(0), e) for e in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    activation, weight = rounders()
    best, errors = search(candidates, x, [w], activation, weight)
    assert len(errors) == 6
    each = [torch.ones(64), *candidates]
    for d, error in zip(each, errors):
        want = (x @ w.T - activation(x / d) @ weight(w * d).T).double().square().sum()
        assert error == pytest.approx(float(want), rel=1e-4)
    assert torch.equal(best, each[errors.index(min(errors))])
    assert min(errors) < 0.2 * errors[0]


def test_without_rounded_activations_the_weights_error_is_what_counts():
    generator = torch.Generator().manual_seed(2)
    x, w = torch.randn(100, 64, generator=generator), torch.randn(32, 64, generator=generator)
    x[:, 5] *= 60
    candidates = [x.abs().mean(0).pow(e) for e in (0.25, 0.5)]
    _, weight = rounders()
    best, errors = search(candidates, x, [w, w[:7]], None, weight)
    each = [torch.ones(64), *candidates]
    for d, error in zip(each, errors):
        want = sum(
            (x @ v.T - (x / d) @ weight(v * d).T).double().square().sum() for v in (w, w[:7])
        )
        assert error == pytest.approx(float(want), rel=1e-3)
    assert torch.equal(best, each[errors.index(min(errors))])


def test_the_identity_is_kept_where_nothing_is_better():
    x, w = torch.randn(50, 16), torch.randn(8, 16)
    best, _ = search([torch.full((16,), 1e-3).cumprod(0).clamp_min(1e-4)], x, [w], *rounders())
    assert torch.equal(best, torch.ones(16))


def test_all_linears_that_share_the_input_count():
    """The first is indifferent, the second decides."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 16, generator=generator)
    w = torch.randn(8, 16, generator=generator)
    d = torch.ones(16)
    d[3] = 100.0
    activation, weight = rounders()
    _, both = search([d], x, [w, 2 * w], activation, weight)
    _, first = search([d], x, [w], activation, weight)
    assert both == pytest.approx([5 * error for error in first], rel=1e-3)


def test_an_error_that_is_no_number_never_wins():
    x, w = torch.ones(2, 4), torch.eye(4)
    candidates = [torch.full((4,), float("nan")), torch.full((4,), 2.0)]

    def poor(w: torch.Tensor) -> torch.Tensor:
        return w + (0.0 if float(w.max()) == 2.0 else 1.0)

    best, errors = search(candidates, x, [w], lambda x: x, poor)
    assert errors[1] == float("inf")
    assert torch.equal(best, candidates[1])
    best, _ = search(candidates[:1], x, [w], lambda x: x * float("nan"), poor)
    assert torch.equal(best, torch.ones(4))


def test_bad_arguments():
    with pytest.raises(ValueError, match="shape"):
        search([torch.ones(3)], torch.ones(2, 4), [torch.ones(2, 4)], *rounders())
    with pytest.raises(ValueError, match="weight"):
        search([], torch.ones(2, 4), [], *rounders())
