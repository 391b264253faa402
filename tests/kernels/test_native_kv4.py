"""The C++ ways of INT4 keys and values where they differ from what the shared tests reach."""

import pytest
import torch
from quantkit.kernels.cpu import hadamard as native_hadamard
from quantkit.kernels.cpu import kv4, native, rows
from quantkit.kernels.hadamard import hadamard
from quantkit.kernels.kv4 import kv4_dequantize, kv4_quantize
from quantkit.kernels.kv4_attention import kv4_attention

pytestmark = pytest.mark.skipif(native.level() == 0, reason="no C++ compiler, or no AVX-512-BF16")
# batch, query heads, KV heads, tokens, length, head_dim: blocks of 256 keys, parts for threads, rows by fours
SHAPES = [
    (1, 1, 1, 1, 1, 64),
    (1, 4, 1, 1, 1300, 64),
    (1, 3, 1, 1, 257, 80),
    (2, 4, 2, 3, 2050, 96),
    (1, 8, 2, 2, 300, 128),
    (1, 5, 1, 5, 1100, 256),
    (1, 2, 1, 1, 40, 20),
]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("masked", ["none", "causal", "bool", "additive"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float8_e4m3fn"])
def test_attention(shape, masked, threads, scale_dtype, relative_error) -> None:
    batch, heads, kv_heads, tokens, length, dim = shape
    torch.set_num_threads(threads)
    query = torch.randn(batch, tokens, heads, dim).transpose(1, 2)
    packed = [
        kv4_quantize(torch.randn(batch, kv_heads, length, dim), scale_dtype) for _ in range(2)
    ]
    mask = None
    if masked == "bool":
        mask = torch.rand(batch, heads, tokens, length) < 0.7
        mask[0, 0, 0] = False
    elif masked == "additive":
        mask = torch.randn(1, 1, tokens, length)
        mask[..., length // 2 :] = -torch.inf
    post_scale = torch.rand(kv_heads, dim) + 0.5
    arguments = (query, *packed, mask, dim**-0.5, masked == "causal", post_scale, True)
    found = kv4.attention(*arguments)
    assert found is not None
    assert relative_error(found, kv4_attention.reference(*arguments)) < 2e-6


def test_attention_over_a_part_of_a_longer_cache() -> None:
    cache = kv4_quantize(torch.randn(2, 2, 900, 64))
    query, part = torch.randn(2, 2, 1, 64), cache[:, :, 100:700]
    found = kv4.attention(query, part, part, None, 0.1, False, None, False)
    expected = kv4.attention(
        query, part.contiguous(), part.contiguous(), None, 0.1, False, None, False
    )
    assert torch.equal(found, expected)


def test_large_scores_stay_finite(relative_error) -> None:
    query, key = torch.randn(1, 2, 1, 64) * 100, torch.randn(1, 1, 700, 64) * 10
    packed = kv4_quantize(key)
    found = kv4.attention(query, packed, packed, None, 1.0, False, None, False)
    expected = kv4_attention.reference(query, packed, packed, None, 1.0, False, None, False)
    assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("dim", [20, 64, 80, 128])
def test_packing_gives_the_references_bits(dim, scale_dtype, dtype) -> None:
    x = torch.randn(2, 5, 3, dim).transpose(1, 2).to(dtype)
    x[0, 0, 0] = 0
    x[0, 0, 1] *= 1e5
    x[0, 0, 2] *= 1e-5
    factor = torch.rand(3, dim) + 0.5
    for given in (None, factor):
        packed = kv4.quantize(x, given, scale_dtype == "float8_e4m3fn")
        assert torch.equal(packed, kv4_quantize.reference(x, scale_dtype, given))
    expanded = kv4.dequantize(packed, dim, dtype)
    assert torch.equal(expanded, kv4_dequantize.reference(packed, dim, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("k", "block"), [(256, 128), (7, 1), (6, 2), (24, 8), (48, 16), (4096, 4096), (32768, 32768)]
)
def test_rotation(k, block, dtype, relative_error) -> None:
    x = torch.randn(3, k).to(dtype)
    expected = hadamard.reference(x.float(), block)
    bound = 1e-6 if dtype == torch.float32 else 3e-3
    assert relative_error(native_hadamard.rotate(x, block), expected) < bound
    codes, scale = native_hadamard.rotate_and_quantize(x, block, rows.INTEGER, -127, 127, 127.0)
    assert relative_error(codes.float() * scale, expected) < 0.02
    wanted, wanted_scale = rows.quantize(expected, rows.INTEGER, -127, 127, 127.0)
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-5, atol=0)
    assert (codes != wanted).float().mean() < 0.01
