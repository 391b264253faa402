import pytest
import torch
from quantkit.kernels import int4pack
from quantkit.kernels.int4_fp8_linear import int4_fp8_linear
from quantkit.kernels.quantize_fp8 import quantize_fp8

BOUND = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-5}
SHAPES = [(1, 32, 128), (3, 16, 14336), (0, 32, 128), (37, 48, 384), (130, 24, 256)]


def _weights(weight) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The weight in each layout that this machine has."""
    repacked = int4pack.repack(weight.packed, weight.scale)
    return [(weight.packed, weight.scale), *([repacked] if repacked else [])]


def _fp8_products(weight) -> torch.Tensor:
    """e4m3(q * s') with s' = e4m3(scale / channel), group by group, in float64."""
    codes, scale = weight.codes.double(), weight.scale.float()
    group = codes.shape[1] // scale.shape[1]
    dense = torch.empty_like(codes)
    for row in range(len(codes)):
        channel = scale[row].max() / 448
        for g in range(scale.shape[1]):
            code = (scale[row, g] / channel).to(torch.float8_e4m3fn).double()
            columns = slice(g * group, (g + 1) * group)
            product = (codes[row, columns] * code / 8).to(torch.float8_e4m3fn).double() * 8
            dense[row, columns] = product * channel.double()
    return dense


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("products", ["exact", "fp8"])
@pytest.mark.parametrize("out_dtype", list(BOUND))
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_against_float64(m, n, k, out_dtype, products, int4_weight, relative_error) -> None:
    weight = int4_weight(n, k, 128)
    x8, x_scale = quantize_fp8(torch.randn(m, k))
    bias = torch.randn(n)
    dense = weight.dense() if products == "exact" else _fp8_products(weight)
    expected = (x8.double() @ dense.t()) * x_scale.double() + bias.double()
    for packed, scale in _weights(weight):
        y = int4_fp8_linear(x8, x_scale, packed, scale, bias, out_dtype, products)
        assert y.dtype == out_dtype
        assert relative_error(y, expected) < BOUND[out_dtype]


@pytest.mark.usefixtures("backend")
def test_the_two_products_differ(int4_weight, relative_error) -> None:
    """By about 2 %, e4m3's rounding: told apart, and near each other."""
    weight = int4_weight(64, 512, 128)
    x8, x_scale = quantize_fp8(torch.randn(8, 512))
    exact, rounded = (
        int4_fp8_linear(x8, x_scale, weight.packed, weight.scale, products=products)
        for products in ("exact", "fp8")
    )
    assert 5e-3 < relative_error(rounded, exact) < 5e-2


@pytest.mark.usefixtures("backend")
def test_per_channel_and_batch_dimensions(int4_weight, relative_error) -> None:
    weight = int4_weight(48, 384, 384)
    x8, x_scale = quantize_fp8(torch.randn(2, 3, 384))
    expected = (x8.double() @ weight.dense().t()) * x_scale.double()
    for packed, scale in _weights(weight):
        assert relative_error(int4_fp8_linear(x8, x_scale, packed, scale), expected) < 5e-3


@pytest.mark.usefixtures("backend")
def test_non_contiguous(int4_weight) -> None:
    weight = int4_weight(32, 128, 128)
    x8, x_scale = quantize_fp8(torch.randn(5, 128))
    strided = x8.t().contiguous().t()
    for packed, scale in _weights(weight):
        expected = int4_fp8_linear(x8, x_scale, packed, scale)
        assert torch.equal(int4_fp8_linear(strided, x_scale, packed, scale), expected)


@pytest.mark.usefixtures("backend")
def test_stored_fp8_scales_are_recovered_bit_for_bit() -> None:
    """Scales written as code * channel, the row's largest code 448, 448 * channel a bf16 number."""
    from quantkit.kernels.int4_fp8_linear import split_scales

    codes = (torch.rand(64, 8) * 447 + 1).to(torch.float8_e4m3fn)
    codes[:, 3] = 448
    channel = (torch.rand(64, 1) + 0.1).bfloat16().float() / 448
    stored = (codes.float() * channel).bfloat16()
    found, found_channel = split_scales(stored)
    assert torch.equal(found.float(), codes.float())
    assert torch.equal(found_channel, channel)


def test_opcheck(int4_weight) -> None:
    weight = int4_weight(32, 128, 128)
    x8, x_scale = quantize_fp8(torch.randn(2, 3, 128))
    arguments = (x8, x_scale, weight.packed, weight.scale, torch.randn(32), torch.float16, "fp8")
    # test_schema compares its inputs with arithmetic that torch does not have for FP8.
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.quantkit.int4_fp8_linear.default
    torch.library.opcheck(op, arguments, test_utils=utilities)


def test_bad_input(int4_weight) -> None:
    weight = int4_weight(32, 256, 128)
    x8, x_scale = quantize_fp8(torch.randn(2, 256))
    good = (weight.packed, weight.scale)
    with pytest.raises(ValueError, match=r"x must be torch\.float8_e4m3fn"):
        int4_fp8_linear(x8.float(), x_scale, *good)
    with pytest.raises(ValueError, match=r"x_scale must be \(2, 1\).*got \(2,\)"):
        int4_fp8_linear(x8, x_scale[:, 0], *good)
    with pytest.raises(ValueError, match="products must be one of exact, fp8, got 'bf16'"):
        int4_fp8_linear(x8, x_scale, *good, products="bf16")
    with pytest.raises(ValueError, match=r"x must be \[..., 256\].*\(2, 128\)"):
        int4_fp8_linear(x8[:, :128], x_scale, *good)
