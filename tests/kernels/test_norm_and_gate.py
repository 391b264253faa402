"""`rmsnorm_quantize` and `silu_mul_quantize` against float64."""

import pytest
import torch
from quantkit.kernels.quantize_rows import quantize_rows
from quantkit.kernels.rmsnorm_quantize import rmsnorm_quantize
from quantkit.kernels.silu_mul_quantize import silu_mul_quantize

FORMS = [("fp8", 8), ("int8", 8), ("int8", 4), ("half", 4), ("half", 8)]
SHAPES = [(1, 64), (3, 5, 200), (40, 1000), (0, 32), (2, 7)]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def _codes_agree(codes, scale, values, form, bits) -> None:
    """The codes are those of the values, but for a value on the edge between two."""
    expected, expected_scale = quantize_rows(values, form, bits)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=1e-12)
    if codes.numel():
        different = codes.view(torch.int8) != expected.view(torch.int8)
        assert different.float().mean() < 0.01


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_norm(form, bits, shape, dtype, with_residual, relative_error) -> None:
    x, weight = torch.randn(shape).to(dtype) * 3, torch.rand(shape[-1]).to(dtype) + 0.5
    residual = torch.randn(shape).to(dtype) if with_residual else None
    y, codes, scale, hidden = rmsnorm_quantize(x, weight, 1e-5, form, bits, residual)
    total = x if residual is None else x + residual
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative_error(y, expected) < BOUND[dtype]
    assert y.dtype == dtype
    assert torch.equal(hidden, total) if with_residual else hidden.numel() == 0
    _codes_agree(codes, scale, y, form, bits)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_gate(form, bits, shape, dtype) -> None:
    gate, up = (torch.randn(shape).to(dtype) * 4 for _ in range(2))
    codes, scale = silu_mul_quantize(torch.cat((gate, up), dim=-1), form, bits)
    silu = (gate.double() / (1 + (-gate.double()).exp())).to(dtype)
    _codes_agree(codes, scale, silu * up, form, bits)


@pytest.mark.usefixtures("backend")
def test_strided_rows() -> None:
    x, weight = torch.randn(6, 3, 128).bfloat16()[:, 1, :64], torch.rand(64).bfloat16()
    for a, b in zip(
        rmsnorm_quantize(x, weight, 1e-5, "int8"),
        rmsnorm_quantize(x.contiguous(), weight, 1e-5, "int8"),
        strict=True,
    ):
        assert torch.equal(a, b)
    for a, b in zip(
        silu_mul_quantize(x, "int8"), silu_mul_quantize(x.contiguous(), "int8"), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("backend")
def test_gates_that_saturate() -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4]])
    codes, scale = silu_mul_quantize(torch.cat((gate, torch.ones(1, 6)), -1), "int8")
    assert codes.tolist() == [[0, 0, 0, 0, 1, 127]]
    assert scale.item() == pytest.approx(1e4 / 127)


@pytest.mark.usefixtures("backend")
def test_not_a_number_is_not_hidden() -> None:
    x = torch.ones(2, 64)
    x[1, 3] = float("nan")
    assert rmsnorm_quantize(x, torch.ones(64), 1e-5, "fp8")[2].isnan().tolist() == [[False], [True]]
    assert silu_mul_quantize(x, "int8")[1].isnan().tolist() == [[False], [True]]
