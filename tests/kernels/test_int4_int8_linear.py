import pytest
import torch
from quantkit.kernels import int4pack
from quantkit.kernels.int4_int8_linear import int4_int8_linear
from quantkit.kernels.quantize_half import quantize_half
from quantkit.kernels.quantize_int8 import quantize_int8

BOUND = {torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float32: 1e-5}
SHAPES = [(1, 32, 128), (3, 16, 14336), (0, 32, 128), (37, 48, 384), (130, 24, 256)]


def _weights(weight) -> list[tuple[torch.Tensor, torch.Tensor]]:
    repacked = int4pack.repack(weight.packed, weight.scale)
    return [(weight.packed, weight.scale), *([repacked] if repacked else [])]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out_dtype", list(BOUND))
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_against_float64(m, n, k, out_dtype, bits, int4_weight, relative_error) -> None:
    weight = int4_weight(n, k, 128)
    xq, x_scale = quantize_int8(torch.randn(m, k), bits)
    bias = torch.randn(n)
    expected = (xq.double() @ weight.dense().t()) * x_scale.double() + bias.double()
    for packed, scale in _weights(weight):
        y = int4_int8_linear(xq, x_scale, packed, scale, bias, out_dtype)
        assert y.dtype == out_dtype
        assert relative_error(y, expected) < BOUND[out_dtype]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("out_dtype", list(BOUND))
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (5, 64, 256)])
def test_half_integers_on_both_sides(m, n, k, out_dtype, bits, int4_weight, relative_error) -> None:
    weight = int4_weight(n, k, 128)
    codes, step = quantize_half(torch.randn(m, k), bits)
    bias, residual = torch.randn(n), torch.randn(m, n)
    expected = (
        (codes.double() + 0.5) @ weight.dense(half=True).t()
    ) * step.double() + bias.double()
    repacked = int4pack.repack(weight.packed, weight.scale, half=True)
    for packed, scale in [(weight.packed, weight.scale), *([repacked] if repacked else [])]:
        y = int4_int8_linear(codes, step, packed, scale, bias, out_dtype, True)
        assert y.dtype == out_dtype
        assert relative_error(y, expected) < BOUND[out_dtype]
        added = int4_int8_linear(codes, step, packed, scale, bias, out_dtype, True, residual)
        assert relative_error(added, expected + residual.double()) < BOUND[out_dtype]
        gate, up = expected.chunk(2, dim=-1)
        gated = int4_int8_linear(codes, step, packed, scale, bias, out_dtype, True, gate=True)
        assert relative_error(gated, torch.nn.functional.silu(gate) * up) < 2 * BOUND[out_dtype]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("group", [384, 96, 16])
def test_other_groups_and_batch_dimensions(group, int4_weight, relative_error) -> None:
    weight = int4_weight(48, 384, group)
    xq, x_scale = quantize_int8(torch.randn(2, 3, 384))
    expected = (xq.double() @ weight.dense().t()) * x_scale.double()
    for packed, scale in _weights(weight):
        y = int4_int8_linear(xq, x_scale, packed, scale)
        assert y.shape == (2, 3, 48)
        assert relative_error(y, expected) < 5e-3


@pytest.mark.usefixtures("backend")
def test_non_contiguous(int4_weight) -> None:
    weight = int4_weight(32, 128, 128)
    xq, x_scale = quantize_int8(torch.randn(5, 128))
    strided = xq.t().contiguous().t()
    for packed, scale in _weights(weight):
        expected = int4_int8_linear(xq, x_scale, packed, scale)
        assert torch.equal(int4_int8_linear(strided, x_scale, packed, scale), expected)


def test_opcheck(int4_weight) -> None:
    weight = int4_weight(32, 128, 128)
    xq, x_scale = quantize_int8(torch.randn(2, 3, 128))
    arguments = (xq, x_scale, weight.packed, weight.scale, torch.randn(32), torch.float16)
    torch.library.opcheck(torch.ops.quantkit.int4_int8_linear.default, arguments)


def test_bad_input(int4_weight) -> None:
    weight = int4_weight(32, 256, 128)
    xq, x_scale = quantize_int8(torch.randn(2, 256))
    with pytest.raises(ValueError, match=r"x must be torch\.int8"):
        int4_int8_linear(xq.float(), x_scale, weight.packed, weight.scale)
    with pytest.raises(ValueError, match=r"x must be \[..., 256\].*\(2, 128\)"):
        int4_int8_linear(xq[:, :128], x_scale, weight.packed, weight.scale)
    with pytest.raises(ValueError, match=r"x_scale must be \(2, 1\)"):
        int4_int8_linear(xq, x_scale[:1], weight.packed, weight.scale)
