"""The rotation's Triton kernel, alone and with quantization, against plain torch."""

from __future__ import annotations

import pytest
import torch
from quantkit.kernels.hadamard import hadamard
from quantkit.kernels.hadamard_quantize import hadamard_quantize

BOUND = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 2e-6}
# Narrow and wide blocks, orders times 128, a row that is several programs, one block in two halves.
CASES = [
    ((1, 128), 128),
    ((3, 384), 128),
    ((2, 3, 64), 16),
    ((3, 5), 1),
    ((0, 256), 256),
    ((2, 1024), 512),
    ((2, 4096), 4096),
    ((2, 3072), 1536),
    ((1, 14336), 14336),
    ((1, 14336), 128),
    ((2, 24576), 8192),
    ((2, 32768), 32768),
    # Orders times less than 128, within a line and over several; rows longer than a program.
    ((3, 24), 12),
    ((2, 5, 240), 80),
    ((1, 1920), 192),
    ((2, 1792), 1792),
    ((1, 53248), 128),
]


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("shape", "block"), CASES)
def test_rotation(shape, block: int, dtype, device, relative_error) -> None:
    x = torch.randn(shape).to(dtype).to(device)
    assert relative_error(hadamard(x, block), hadamard.reference(x.float(), block)) < BOUND[dtype]


@pytest.mark.parametrize("block", [512, 1536, 28, 1792])
def test_the_transpose_is_the_inverse(block: int, device, relative_error) -> None:
    x = torch.randn(2, 2 * block, device=device)
    assert relative_error(hadamard(hadamard(x, block), block, transpose=True), x) < 4e-6


@pytest.mark.parametrize(("form", "bits"), [("fp8", 8), ("int8", 8), ("half", 4), ("half", 8)])
@pytest.mark.parametrize(("shape", "block"), CASES)
def test_quantized(shape, block: int, form: str, bits: int, device) -> None:
    x = torch.randn(shape).bfloat16().to(device)
    codes, scale = hadamard_quantize(x, form, bits, block)
    expected, expected_scale = hadamard_quantize.reference(x, form, bits, block)
    assert codes.dtype == expected.dtype
    torch.testing.assert_close(scale, expected_scale, rtol=2e-5, atol=0)
    different = int((codes.view(torch.uint8) != expected.view(torch.uint8)).sum())
    assert different <= 1 + codes.numel() // 200


def test_strided_rows(device, relative_error) -> None:
    x = torch.randn(6, 512, device=device)
    for view in (x[:, :256], x[::2], x[:, ::2]):
        assert relative_error(hadamard(view), hadamard.reference(view)) < 2e-6


def test_what_the_kernel_cannot_take_is_said(device) -> None:
    with pytest.raises(ValueError, match="does not support these shapes"):
        hadamard(torch.randn(1, 65536, device=device), 65536)
