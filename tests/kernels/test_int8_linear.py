import pytest
import torch
from quantkit.kernels.int8_linear import int8_linear

SHAPES = [(1, 32, 128), (2, 32, 128), (3, 16, 14336), (0, 32, 128), (17, 48, 384), (37, 13, 100)]


def _inputs(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    xq = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return xq, torch.rand(m, 1), weight, (torch.rand(n, 1) / 64).bfloat16()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("out_dtype", "bound"),
    [(torch.bfloat16, 3e-3), (torch.float16, 5e-4), (torch.float32, 1e-6)],
)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_against_float64(m, n, k, out_dtype, bound, relative_error) -> None:
    xq, x_scale, weight, scale = _inputs(m, n, k)
    x_scale = x_scale / k
    bias = torch.randn(n)
    y = int8_linear(xq, x_scale, weight, scale, bias, out_dtype)
    exact = (xq.long()[:, None] * weight.long()[None]).sum(-1).double()
    expected = exact * x_scale.double() * scale.double().t() + bias.double()
    assert y.dtype == out_dtype
    assert relative_error(y, expected) < bound


@pytest.mark.usefixtures("backend")
def test_integer_sums_are_exact() -> None:
    """The largest sum there is at this K, odd: float32 accumulation would not hold it."""
    xq = torch.full((2, 14336), -128, dtype=torch.int8)
    weight = torch.full((8, 14336), -128, dtype=torch.int8)
    xq[1], weight[:, 0] = 127, 127
    one = torch.ones(2, 1), torch.ones(8, 1)
    y = int8_linear(xq, one[0], weight, one[1], out_dtype=torch.float64)
    exact = [14335 * 128 * 128 - 128 * 127, -14335 * 127 * 128 + 127 * 127]
    # The sums are exact integers; the scales are applied in float32, which rounds once.
    assert y[:, 0].tolist() == [float(torch.tensor(v, dtype=torch.float32)) for v in exact]


@pytest.mark.usefixtures("backend")
def test_batch_dimensions_and_strides(relative_error) -> None:
    xq, x_scale, weight, scale = _inputs(6, 32, 128)
    expected = int8_linear(xq, x_scale, weight, scale)
    strided = xq.t().contiguous().t()
    assert torch.equal(int8_linear(strided, x_scale, weight, scale), expected)
    batched = int8_linear(xq.view(2, 3, 128), x_scale.view(2, 3, 1), weight, scale)
    assert torch.equal(batched, expected.view(2, 3, 32))


def test_opcheck() -> None:
    arguments = (*_inputs(4, 32, 128), torch.randn(32), torch.float16)
    torch.library.opcheck(torch.ops.quantkit.int8_linear.default, arguments)


def test_bad_input() -> None:
    xq, x_scale, weight, scale = _inputs(4, 32, 128)
    with pytest.raises(ValueError, match=r"xq must be \[..., 128\].*\(4, 64\)"):
        int8_linear(xq[:, :64], x_scale, weight, scale)
    with pytest.raises(ValueError, match=r"scale must be \[32, 1\].*\(32,\)"):
        int8_linear(xq, x_scale, weight, scale[:, 0])
    with pytest.raises(ValueError, match="weight must be int8"):
        int8_linear(xq, x_scale, weight.float(), scale)
    with pytest.raises(ValueError, match=r"bias must be \[32\]"):
        int8_linear(xq, x_scale, weight, scale, torch.zeros(3))
    with pytest.raises(ValueError, match=r"x must be torch\.int8"):
        int8_linear(xq.float(), x_scale, weight, scale)
