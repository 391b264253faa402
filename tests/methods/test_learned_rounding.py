import pytest
import torch
from quantkit.kernels.cpu import native

from quantkit.methods.learned_rounding import encode_with_offset, round_with_offset
from quantkit.methods.rounding import Grid, absmax_scale, dequantize, quantize

GRIDS = [Grid(4), Grid(4, half=True), Grid(8)]


@pytest.fixture(params=["native", "torch"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler, or no AVX-512-BF16")


def problem(size: int = 8):
    """Some values lie beyond the grid; groups of 24 end within a vector."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 4 * size, generator=generator)
    offset = torch.rand(6, 4 * size, generator=generator) - 0.5
    return target, 0.7 * absmax_scale(target, size, Grid(4)), offset


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


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.usefixtures("either_way")
def test_values_and_gradients_are_those_of_each_value_alone(grid: Grid, size: int):
    target, scale, offset = problem(size)
    value, by_offset, by_scale = slow(target, scale, offset, grid)
    scale, offset = scale.requires_grad_(), offset.requires_grad_()
    got = round_with_offset(target, scale, offset, grid)
    assert torch.allclose(got, value, atol=1e-6)
    weight = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward()
    assert torch.allclose(offset.grad, by_offset * weight, atol=1e-6)
    assert torch.allclose(scale.grad, (by_scale * weight).view(6, 4, size).sum(-1), atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.usefixtures("either_way")
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
    with pytest.raises(ValueError, match="fit together"):
        round_with_offset(target, scale[:3], offset, Grid(4))


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler, or no AVX-512-BF16")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_native_is_torch(grid: Grid, monkeypatch: pytest.MonkeyPatch):
    """Large enough for several threads: the same values to the last bit, and gradients but for the order of a sum."""
    generator = torch.Generator().manual_seed(3)
    target, offset = (torch.randn(300, 256, generator=generator) for _ in range(2))
    start, weight = absmax_scale(target, 64, grid), torch.randn(300, 256, generator=generator)
    found = []
    for library in (native.library, lambda: None):
        monkeypatch.setattr(native, "library", library)
        moved, scale = offset.clone().requires_grad_(), start.clone().requires_grad_()
        value = round_with_offset(target, scale, moved, grid)
        (value * weight).sum().backward()
        found.append((value, moved.grad, scale.grad))
    (value, by_offset, by_scale), (same, again, summed) = found
    assert torch.equal(value, same)
    assert torch.equal(by_offset, again)
    assert torch.allclose(by_scale, summed, atol=1e-3)


@pytest.mark.usefixtures("either_way")
def test_a_number_that_is_none_stays_one():
    """A parameter that has diverged must show in the loss."""
    target, scale, offset = problem()
    offset[2, 3] = torch.nan
    value = round_with_offset(target, scale, offset, Grid(4))
    assert value.isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.usefixtures("either_way")
def test_second_gradients_are_refused():
    target, scale, offset = problem()
    offset.requires_grad_()
    value = round_with_offset(target, scale, offset, Grid(4))
    (first,) = torch.autograd.grad(value.square().sum(), offset, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
