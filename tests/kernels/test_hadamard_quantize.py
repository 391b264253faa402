"""`hadamard_quantize` against the rotation in float64 and the quantizers alone."""

import pytest
import torch
from quantkit.kernels.hadamard_matrices import hadamard_matrix
from quantkit.kernels.hadamard_quantize import hadamard_quantize
from quantkit.kernels.quantize_rows import quantize_rows

FORMS = [("fp8", 8), ("int8", 8), ("int8", 4), ("half", 4), ("half", 8)]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((3, 384), 128), ((2, 3, 64), 16), ((1, 1024), 512), ((2, 192), 96), ((2, 96), 1)],
)
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_against_the_two_steps(form: str, bits: int, shape, block: int, dtype) -> None:
    x = torch.randn(shape).to(dtype)
    codes, scale = hadamard_quantize(x, form, bits, block)
    rotated = (
        x.double().view(-1, block)
        @ hadamard_matrix(block, torch.device("cpu")).double()
        / block**0.5
    )
    expected, expected_scale = quantize_rows(rotated.view(shape).float(), form, bits)
    assert codes.dtype == expected.dtype
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    # A last bit of the sum may move a value over the edge between two codes.
    different = codes.view(torch.uint8) != expected.view(torch.uint8)
    assert different.float().mean() < 0.01


@pytest.mark.usefixtures("backend")
def test_empty_and_strided() -> None:
    codes, scale = hadamard_quantize(torch.empty(0, 128), "int8")
    assert codes.shape == (0, 128)
    assert scale.shape == (0, 1)
    x = torch.randn(128, 7).t()
    assert torch.equal(hadamard_quantize(x, "fp8")[1], hadamard_quantize(x.contiguous(), "fp8")[1])


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.quantkit.hadamard_quantize.default, (torch.randn(2, 3, 128), "half", 4, 64)
    )


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="form must be one of fp8, int8, half, got 'int4'"):
        hadamard_quantize(torch.zeros(2, 128), "int4")
    with pytest.raises(ValueError, match=r"multiple of 128.*\(2, 192\)"):
        hadamard_quantize(torch.zeros(2, 192), "int8")
