"""More than 2^31 elements: indices of 64 bits. Zeros that nobody wrote take no memory; results do."""

import pytest
import torch
from quantkit.kernels.int4_linear import int4_linear
from quantkit.kernels.int4pack import repack
from quantkit.kernels.int8_linear import int8_linear
from quantkit.kernels.kv4 import kv4_quantize
from quantkit.kernels.kv4_attention import kv4_attention
from quantkit.kernels.quantize_int8 import quantize_int8

pytestmark = pytest.mark.slow


def test_rows_behind_two_to_the_31() -> None:
    x = torch.zeros(65600, 32768, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-2:] = torch.randn(2, 32768).bfloat16()
    codes, scale = quantize_int8(x)
    expected, expected_scale = quantize_int8.reference(x[-2:])
    assert torch.equal(codes[-2:], expected)
    assert torch.equal(scale[-2:], expected_scale)
    assert not codes[:-2:997].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_behind_two_to_the_31(bits: int) -> None:
    rows, inputs, outputs = 40000, 128, 57344
    assert rows * outputs > 2**31
    if bits == 4:
        words = torch.randint(-(2**31), 2**31 - 1, (outputs, inputs // 8), dtype=torch.int32)
        scale = torch.rand(outputs, 1).bfloat16()
        weight = repack(words, scale) or (words, scale)
        x = torch.randn(rows, inputs).bfloat16()
        y = int4_linear(x, *weight)
        expected = int4_linear(x[-3:], *weight)
    else:
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        scale = torch.rand(outputs, 1).bfloat16()
        x = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
        row_scale = torch.rand(rows, 1) / 1024
        y = int8_linear(x, row_scale, codes, scale)
        expected = int8_linear(x[-3:], row_scale[-3:], codes, scale)
    torch.testing.assert_close(y[-3:], expected, rtol=1e-2, atol=1e-2)


def test_keys_behind_two_to_the_31() -> None:
    cache = torch.zeros(8, 8, 512000, 66, dtype=torch.uint8)
    assert cache.numel() > 2**31
    cache[-1, -1, -50:] = kv4_quantize(torch.randn(1, 1, 50, 128).bfloat16())[0, 0]
    query = torch.randn(8, 8, 1, 128).bfloat16()
    out = kv4_attention(query, cache, cache, None, 1.0, False)
    alone = kv4_attention(query[-1:, -1:], cache[-1:, -1:], cache[-1:, -1:], None, 1.0, False)
    torch.testing.assert_close(out[-1:, -1:], alone, rtol=1e-2, atol=1e-6)
    assert alone.any()
    assert not out[:-1].any()
