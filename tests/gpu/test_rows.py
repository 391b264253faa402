"""Row kernels against the references, which are plain torch."""

from __future__ import annotations

import pytest
import torch
from quantkit.kernels.quantize_fp8 import quantize_fp8
from quantkit.kernels.quantize_half import quantize_half
from quantkit.kernels.quantize_int8 import quantize_int8
from quantkit.kernels.rmsnorm_quantize import rmsnorm_quantize
from quantkit.kernels.silu_mul_quantize import silu_mul_quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 5), (2, 3, 96), (7, 1000), (0, 64), (2, 4096), (2, 40000)]
FORMS = [("fp8", 8), ("int8", 8), ("int8", 4), ("half", 8), ("half", 4), ("half", 1)]


def _x(shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = torch.randn(shape) * torch.randn(shape).exp()
    return x.to(dtype).to(device)


def _same(got, want, form: str) -> None:
    """Codes and scales equal; where a sum of another order made the scale, all but a code at an edge."""
    codes, scale = got
    expected, expected_scale = want
    assert codes.dtype == expected.dtype
    exact = form in ("fp8", "int8")
    torch.testing.assert_close(scale, expected_scale, rtol=0 if exact else 1e-6, atol=0)
    different = int((codes.view(torch.uint8) != expected.view(torch.uint8)).sum())
    assert different <= (0 if exact else 1 + codes.numel() // 2000)


@pytest.mark.parametrize(("form", "bits"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize(shape, dtype, form: str, bits: int, device) -> None:
    op = {"fp8": quantize_fp8, "int8": quantize_int8, "half": quantize_half}[form]
    extra = () if form == "fp8" else (bits,)
    x = _x(shape, dtype, device)
    _same(op(x, *extra), op.reference(x, *extra), form)


def test_every_finite_bf16_value_to_e4m3(device) -> None:
    every = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    x = every[every.isfinite()].clamp(-448, 448).float()
    rows = torch.nn.functional.pad(x, (0, -len(x) % 4096), value=448.0).view(-1, 4096)
    rows[:, 0] = 448.0  # so that every row's scale is 1
    codes, scale = quantize_fp8(rows.to(device))
    assert (scale == 1).all()
    assert torch.equal(codes.cpu().view(torch.uint8), rows.to(codes.dtype).view(torch.uint8))


def test_ties_round_to_even(device) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=device)
    codes, _ = quantize_int8(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_nan_infinity_and_zeros(device) -> None:
    x = torch.tensor([[1.0, float("nan")], [0.0, 0.0], [float("inf"), 1.0]], device=device)
    codes, scale = quantize_fp8(x)
    assert scale[0].isnan()
    assert codes[0, 1].float().isnan()
    assert scale[1] == 0
    assert (codes[1].float() == 0).all()
    assert scale[2].isinf()


def test_strided_rows(device) -> None:
    x = torch.randn(6, 200, device=device)
    for view in (x[:, :128], x.t(), x[::2]):
        assert torch.equal(quantize_int8(view)[0], quantize_int8.reference(view)[0])
    gate_up = x[:, :128]
    assert torch.equal(
        silu_mul_quantize(gate_up, "int8")[0], silu_mul_quantize(gate_up.contiguous(), "int8")[0]
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("form", "bits"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_quantize(dtype, form: str, bits: int, residual: bool, device) -> None:
    for shape in ((3, 1, 96), (2, 1000), (0, 8), (1, 33000)):
        x = _x(shape, dtype, device)
        weight = torch.rand(shape[-1], device=device).to(dtype) + 0.5
        other = _x(shape, dtype, device) if residual else None
        y, codes, scale, hidden = rmsnorm_quantize(x, weight, 1e-5, form, bits, other)
        want = rmsnorm_quantize.reference(x, weight, 1e-5, form, bits, other)
        # The row's sum has another order: a unit in the last place of a few elements.
        torch.testing.assert_close(y, want[0], rtol=2.0**-7, atol=1e-6)
        if residual:
            assert torch.equal(hidden, want[3])
        quantized = {"fp8": quantize_fp8, "int8": quantize_int8, "half": quantize_half}[form]
        _same((codes, scale), quantized.reference(y, *(() if form == "fp8" else (bits,))), form)


@pytest.mark.parametrize(("form", "bits"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_quantize(dtype, form: str, bits: int, device, relative_error) -> None:
    for shape in ((2, 3, 192), (1, 2000), (0, 16), (1, 66000)):
        gate_up = _x(shape, dtype, device)
        codes, scale = silu_mul_quantize(gate_up, form, bits)
        want_codes, want_scale = silu_mul_quantize.reference(gate_up, form, bits)
        offset = 0.5 if form == "half" else 0.0
        got = (codes.float() + offset) * scale
        want = (want_codes.float() + offset) * want_scale
        # exp differs in its last bits, and so a code at an edge.
        assert relative_error(got, want) < (0.2 if bits == 1 else 0.05 if bits == 4 else 5e-3)


@pytest.mark.slow
def test_rows_far_apart(device) -> None:
    """Offsets beyond 2^31. The zeros between take address space only."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    x = torch.zeros(2**31 + 256, dtype=torch.bfloat16, device=device).as_strided(
        (3, 256), (2**30, 1)
    )
    x[2] = torch.randn(256).to(x)
    codes, scale = quantize_int8(x)
    expected, expected_scale = quantize_int8.reference(x[2:])
    assert torch.equal(codes[2:], expected)
    assert torch.equal(scale[2:], expected_scale)
