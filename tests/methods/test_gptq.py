import pytest
import torch
from quantkit.kernels.cpu import native

from quantkit.methods import gptq as module
from quantkit.methods.gptq import accumulate_hessian, complete_hessian, factorize, gptq
from quantkit.methods.rounding import Grid, absmax_scale, dequantize, gaussian_scale, quantize

GRID = Grid(4)


@pytest.fixture(autouse=True, params=["native", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no native library on this machine")


def problem(rows: int = 24, columns: int = 256, tokens: int = 600):
    """A weight and strongly correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (
        mix + 0.3 * torch.randn(1, columns, generator=generator)
    )
    weight = torch.randn(rows, columns, generator=generator)
    return weight, x, 2 * x.T @ x


def solve(weight, hessian, scale, grid, *, block=128, **settings):
    return gptq(weight, factorize(hessian, **settings), scale, grid, block=block)


def textbook(weight, hessian, scale, grid, damping, order):
    """Optimal brain surgeon, a column at a time, with the inverse Hessian of what is left computed anew each time."""
    w, h = weight.double().clone(), hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    width = weight.shape[1] // scale.shape[1]
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    left = list(order)
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        j = left[0]
        s = scale[:, j // width].double()
        level = torch.floor(w[:, j] / s) if grid.half else torch.round(w[:, j] / s)
        q = level.clamp(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1)
        codes[:, j] = q.to(torch.int8)
        error = (w[:, j] - (q + (0.5 if grid.half else 0)) * s) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0][None, :]
        left = left[1:]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [Grid(4), Grid(4, half=True), Grid(8)], ids=str)
def test_equals_the_textbook(grid: Grid, act_order: bool):
    weight, _, hessian = problem(columns=64)
    scale = (gaussian_scale if grid.half else absmax_scale)(weight, 16, grid)
    order = (
        hessian.diagonal().argsort(descending=True, stable=True).tolist()
        if act_order
        else range(64)
    )
    want = textbook(weight, hessian, scale, grid, 0.01, order)
    got = solve(weight, hessian, scale, grid, act_order=act_order, block=24).codes
    # A value that lies on a boundary may fall either way, and moves what follows it.
    assert float((got == want).float().mean()) > 0.995


def test_huge_inputs_that_are_nearly_alike():
    """As badly conditioned as damping allows: float32 factors lose nothing against the textbook in float64."""
    weight, x, _ = problem(rows=20, columns=128)
    x[:, 5] *= 1e4
    x[:, 6] = x[:, 5] * (1 + 1e-4 * torch.randn(len(x), generator=torch.Generator().manual_seed(5)))
    x[:, 6] += x[:, 7]
    hessian = 2 * x.T @ x
    scale = absmax_scale(weight, 32, GRID)
    errors = []
    for codes in (
        solve(weight, hessian, scale, GRID).codes,
        textbook(weight, hessian, scale, GRID, 0.01, range(128)),
    ):
        missed = x.double() @ (dequantize(codes, scale, GRID) - weight).T.double()
        errors.append(float(missed.square().sum()))
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("group_size", [32, 128, None])
def test_beats_rounding_on_correlated_inputs(group_size: int | None):
    weight, x, hessian = problem()
    scale = absmax_scale(weight, group_size, GRID)

    def error(codes: torch.Tensor) -> float:
        return float((x @ (dequantize(codes, scale, GRID) - weight).T).square().sum())

    assert error(solve(weight, hessian, scale, GRID).codes) < 0.6 * error(
        quantize(weight, scale, GRID)
    )


def test_the_block_size_changes_nothing():
    weight, _, hessian = problem()
    scale = absmax_scale(weight, 128, GRID)
    codes = [solve(weight, hessian, scale, GRID, block=b).codes for b in (1, 100, 128, 1000)]
    assert all(float((c == codes[0]).float().mean()) > 0.995 for c in codes)


def test_many_rows_are_rounded_as_each_alone():
    """Rows are worked on in parts; the last part is smaller."""
    weight, _, hessian = problem(rows=2100, columns=32)
    scale = absmax_scale(weight, 16, GRID)
    codes = solve(weight, hessian, scale, GRID, act_order=True).codes
    for part in (slice(0, 30), slice(2040, 2100)):
        alone = solve(weight[part], hessian, scale[part], GRID, act_order=True).codes
        assert float((codes[part] == alone).float().mean()) > 0.995


def test_inputs_are_left_alone_and_checked():
    weight, _, hessian = problem(columns=64)
    scale = absmax_scale(weight, 16, GRID)
    before = weight.clone(), hessian.clone(), scale.clone()
    solve(weight, hessian, scale, GRID)
    solve(weight, hessian, scale, GRID, act_order=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, scale)))
    with pytest.raises(ValueError, match="Hessian of 64 inputs"):
        solve(weight, hessian[:32, :32], scale, GRID)
    with pytest.raises(ValueError, match="do not fit"):
        solve(weight, hessian, scale[:, :3], GRID)
    with pytest.raises(ValueError, match="positive"):
        solve(weight, hessian, scale, GRID, damping=0.0)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_hessians_size_does_not_matter(size: float):
    weight, _, hessian = problem(columns=64)
    scale = absmax_scale(weight, 16, GRID)
    same = (
        solve(weight, hessian, scale, GRID).codes
        == solve(weight, hessian * size, scale, GRID).codes
    )
    assert float(same.float().mean()) > 0.995


def test_dead_inputs_are_rounded_plainly():
    weight, x, _ = problem()
    x[:, [3, 200]] = 0
    scale = absmax_scale(weight, 128, GRID)
    result = solve(weight, 2 * x.T @ x, scale, GRID)
    assert torch.equal(result.codes[:, [3, 200]], quantize(weight, scale, GRID)[:, [3, 200]])


@pytest.mark.parametrize("spoil", ["nan", "inf", "negative", "zero"])
def test_a_hessian_that_cannot_be_used_is_no_crash(spoil: str):
    weight, _, hessian = problem()
    if spoil == "negative":
        hessian = -hessian
    elif spoil == "zero":
        hessian = torch.zeros_like(hessian)
    else:
        hessian[0, 0] = float(spoil)
    factor = factorize(hessian)
    assert (factor is None) == (spoil != "zero")
    if factor:
        scale = absmax_scale(weight, 128, GRID)
        found = gptq(weight, factor, scale, GRID)
        assert torch.equal(found.codes, quantize(weight, scale, GRID))
        assert found.loss == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_loss_is_that_of_the_errors(act_order: bool):
    weight, x, _ = problem(rows=30)
    x[:, [3, 200]] = 0
    scale = absmax_scale(weight, 128, GRID)
    found = solve(weight, 2 * x.T @ x, scale, GRID, act_order=act_order)
    errors = (weight - dequantize(found.codes, scale, GRID)).double()
    assert found.loss == pytest.approx(2 * float((x.double() @ errors.T).square().sum()), rel=1e-4)


@pytest.mark.parametrize(("columns", "shift", "damping"), [(1100, 0.0, 0.01), (64, 0.05, 0.1)])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_damped_hessian(
    columns: int, shift: float, damping: float, act_order: bool
):
    """Also one that is indefinite until the damping has grown."""
    _, _, hessian = problem(columns=columns, tokens=2 * columns)
    identity = torch.eye(columns, dtype=torch.float64)
    values = torch.linalg.eigvalsh(hessian.double())
    hessian -= ((values[0] + shift * values.mean()) * identity).float() if shift else 0
    factor = factorize(hessian, act_order=act_order)
    assert factor is not None
    assert factor.damping == pytest.approx(damping)
    assert torch.equal(factor.ratios, factor.ratios.triu())
    assert torch.equal(factor.ratios.diagonal(), torch.ones(columns))
    ratios, pivots = factor.ratios.double(), factor.pivots.double()
    order = torch.arange(len(hessian)) if factor.order is None else factor.order
    damped = (hessian.double() / factor.mean + damping * identity)[order][:, order]
    assert torch.allclose(ratios @ pivots.diag() @ ratios.T, damped, atol=1e-4)


@pytest.mark.parametrize("columns", [96, 256, 600])
def test_a_hessian_in_parts_is_the_hessian(columns: int):
    _, x, _ = problem(columns=columns)
    hessian = (2 * x.double().T @ x.double()).float()
    parts = torch.zeros_like(hessian)
    for part in x.split(171):
        accumulate_hessian(parts, part)
    complete_hessian(parts)
    assert torch.allclose(parts, hessian, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", [Grid(4), Grid(4, half=True)], ids=str)
def test_codes_are_the_targets_nearest_levels(grid: Grid, act_order: bool):
    weight, _, hessian = problem(columns=64)
    scale = absmax_scale(weight, 16, grid)
    result = solve(weight, hessian, scale, grid, act_order=act_order)
    assert torch.equal(quantize(result.target, scale, grid), result.codes)
    assert not torch.equal(result.target, weight)


@pytest.mark.parametrize("columns", [255, 256])
def test_working_in_place_by_chunks_is_the_same(columns: int, monkeypatch: pytest.MonkeyPatch):
    _, _, hessian = problem(columns=columns)
    hessian[7], hessian[:, 7] = 0, 0
    whole = factorize(hessian, act_order=True)
    monkeypatch.setattr(module, "_CHUNK", 48)
    parts = factorize(hessian, act_order=True)
    assert whole
    assert parts
    assert torch.equal(parts.ratios, whole.ratios)


def test_the_factor_takes_little_more_than_one_matrix():
    columns = 1024
    hessian = 2 * torch.eye(columns)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        factorize(hessian)
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    # float64 in place, and a few pieces of half its size at this small number of columns.
    assert 8 * columns**2 < peak < 24 * columns**2
