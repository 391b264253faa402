import pytest
import torch
from quantkit.kernels.wide_linear import wide_linear


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_the_product_with_the_expanded_weight(dtype, groups: int, half: bool):
    """Also in tiles that do not divide the rows."""
    generator = torch.Generator().manual_seed(groups)
    n, k = 5000, 384
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, groups, generator=generator).bfloat16() / 100
    x = torch.randn(2, 3, k, generator=generator).to(dtype)
    step, bias = torch.rand(2, 3, 1, generator=generator), torch.randn(n, generator=generator)
    values = codes.double() + (0.5 if half else 0.0)
    dense = values * scale.double().repeat_interleave(k // groups, 1)
    want = step.double() * (x.double() @ dense.T) + bias.double()
    got = wide_linear(x, step, codes, scale, bias, dtype, half)
    assert (got.dtype, got.shape) == (dtype, (2, 3, n))
    near = 1e-5 if dtype == torch.float32 else 6e-3
    assert float((got.double() - want).norm() / want.norm()) < near
    plain = wide_linear(x, None, codes, scale, None, dtype, half)
    assert torch.allclose(plain.float() * step + bias, got.float(), rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (((2, 8), (4, 16), (4, 1)), "x must be"),
        (((2, 16), (4, 16), (4, 3)), "a divisor of K"),
        (((2, 16), (4, 16), (3, 1)), "scale must be"),
    ],
)
def test_shapes_that_do_not_fit(shapes, says: str):
    x, weight, scale = shapes
    codes = torch.zeros(weight, dtype=torch.int8)
    with pytest.raises(ValueError, match=says):
        wide_linear(torch.zeros(x), None, codes, torch.ones(scale))
