"""The INT4 cache's kernels against their references."""

from __future__ import annotations

import math

import pytest
import torch
from quantkit.kernels.kv4 import kv4_dequantize, kv4_quantize, planes
from quantkit.kernels.kv4_append import kv4_append
from quantkit.kernels.kv4_attention import kv4_attention

SCALES = ["bfloat16", "float8_e4m3fn"]
# P and the operands are bf16: half a unit in the last of eight bits, over the keys as good as independent.
BOUND = 4e-3


def _packed(shape, scale_dtype, device):
    return kv4_quantize.reference(torch.randn(shape, device=device), scale_dtype)


def _planar(cache, dim):
    out = torch.empty_like(cache)
    codes, scales = planes(out, dim, True)
    codes.copy_(cache[..., : dim // 2])
    scales.copy_(cache[..., dim // 2 :])
    return out


def _poison(shape, device):
    return torch.full(shape, 0xAB, dtype=torch.uint8, device=device)


# batch, query heads, KV heads, tokens, length, head_dim
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4, 1, 1, 1, 64),
        (2, 4, 4, 1, 130, 64),
        (1, 3, 1, 2, 300, 80),
        (1, 8, 1, 1, 257, 128),
        (1, 4, 2, 5, 77, 96),
        (2, 2, 1, 33, 33, 64),
        (1, 8, 2, 20, 90, 128),
        (1, 2, 1, 1, 70, 256),
        (1, 2, 2, 3, 40, 32),
    ],
)
@pytest.mark.parametrize(
    ("is_causal", "scale_dtype"), [(False, SCALES[0]), (True, SCALES[0]), (False, SCALES[1])]
)
def test_attention(shape, is_causal, scale_dtype, device, relative_error) -> None:
    batch, heads, kv_heads, tokens, length, dim = shape
    key, value = (_packed((batch, kv_heads, length, dim), scale_dtype, device) for _ in range(2))
    query = torch.randn(batch, tokens, heads, dim, device=device).transpose(1, 2)
    post_scale = torch.rand(kv_heads, dim, device=device) + 0.5
    arguments = (key, value, None, dim**-0.5, is_causal, post_scale)
    for dtype, quantize_query in ((torch.float32, True), (torch.bfloat16, False)):
        given = query.to(dtype)
        found = kv4_attention(given, *arguments, quantize_query)
        expected = kv4_attention.reference(given.float(), *arguments, quantize_query)
        assert found.dtype == dtype
        assert relative_error(found.float(), expected) < BOUND


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("kind", ["bool", "additive", "per head"])
def test_masks(kind, tokens, device, relative_error) -> None:
    key, value = (_packed((2, 2, 150, 64), "bfloat16", device) for _ in range(2))
    query = torch.randn(2, 4, tokens, 64, device=device)
    heads = 4 if kind == "per head" else 1
    mask = torch.rand(2, heads, tokens, 150, device=device) < 0.6
    mask[:, :, 0] = False  # attends to nothing: zeros
    mask[1, :, :, :40] = False  # left padding
    if kind == "additive":
        mask = torch.where(mask, torch.randn(mask.shape, device=device), -math.inf)
    arguments = (query, key, value, mask, 0.125, False)
    found = kv4_attention(*arguments)
    assert relative_error(found, kv4_attention.reference(*arguments)) < BOUND
    assert not found[:, :, 0].any()


@pytest.mark.parametrize("window", [1, 20, 64, 500])
@pytest.mark.parametrize(("tokens", "length"), [(1, 200), (9, 200), (70, 70)])
def test_windows(tokens, length, window, device, relative_error) -> None:
    key, value = (_packed((1, 1, length, 64), "bfloat16", device) for _ in range(2))
    query = torch.randn(1, 2, tokens, 64, device=device)
    arguments = (query, key, value, None, 0.125, True, None, True, None, window)
    found = kv4_attention(*arguments)
    assert relative_error(found, kv4_attention.reference(*arguments)) < BOUND


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("there", [1, 40, 128, 131])
@pytest.mark.parametrize("scale_dtype", SCALES)
def test_a_static_cache(scale_dtype, there, planar, device, relative_error) -> None:
    key, value = (_packed((1, 2, 160, 64), scale_dtype, device) for _ in range(2))
    for cache in (key, value):
        cache[:, :, there:, 32:] = 0x7F  # scales that are not numbers: must not be read
    query, length = torch.randn(1, 4, 1, 64, device=device), torch.tensor(there, device=device)
    expected = kv4_attention.reference(
        query, key[:, :, :there], value[:, :, :there], None, 0.125, True
    )
    if planar:
        key, value = _planar(key, 64), _planar(value, 64)
    found = kv4_attention(query, key, value, None, 0.125, True, None, True, length, 0, planar)
    assert relative_error(found, expected) < BOUND


@pytest.mark.parametrize("split", [1, 2, 8])
def test_splits_agree(split, device, relative_error) -> None:
    from quantkit.kernels.gpu import kv4_decode
    from quantkit.kernels.gpu.kv4_cache import hidden, readable

    key, value = (_packed((1, 2, 500, 64), "bfloat16", device) for _ in range(2))
    query = torch.randn(1, 8, 1, 64, device=device) * 30
    config = {"BM": 16, "BN": 64, "SPLIT": split, "num_warps": 4, "num_stages": 2}
    caches = (readable(cache, 64, False) for cache in (key, value))
    seen = hidden(None, 1, 8, 1)
    found = kv4_decode.attention(query, *caches, seen, 0.125, False, None, True, config=config)
    expected = kv4_attention.reference(query, key, value, None, 0.125, False)
    assert relative_error(found, expected) < BOUND


def test_whole_prompts_expand(device, relative_error) -> None:
    key, value = (_packed((1, 1, 272, 80), "bfloat16", device) for _ in range(2))
    query = torch.randn(1, 2, 256, 80, device=device)
    there = torch.tensor([256], device=device)
    arguments = (query, key, value, None, 0.125, True, None, True, there)
    found = kv4_attention(*arguments)
    assert relative_error(found, kv4_attention.reference(*arguments)) < 1e-5


# batch, query heads, KV heads, tokens, length, window, head_dim
PROMPTS = [
    (1, 4, 1, 40, 90, 0, 128),
    (2, 2, 2, 70, 70, 0, 64),
    (1, 4, 2, 33, 150, 0, 80),
    (1, 3, 1, 30, 64, 20, 96),
    (1, 2, 1, 70, 75, 40, 256),
]


# The interpreter takes seconds for a prompt: one kind of products will do by default, with one test of few queries.
FP8 = pytest.mark.slow


@pytest.mark.parametrize(
    ("products", "bound"), [("exact", BOUND), pytest.param("fp8", 0.03, marks=FP8)]
)
@pytest.mark.parametrize("shape", PROMPTS)
def test_prompts(shape, products, bound, device, relative_error) -> None:
    """Chunks and whole prompts by the fused kernel, in caches with room left over."""
    batch, heads, kv_heads, tokens, length, window, dim = shape
    scale_dtype = SCALES[tokens % 2]
    key, value = (
        _packed((batch, kv_heads, length + 9, dim), scale_dtype, device) for _ in range(2)
    )
    for cache in (key, value):
        cache[:, :, length:, dim // 2 :] = 0x7F  # scales that are not numbers: must not be read
    value[:, :, 3] = _packed((dim,), scale_dtype, device) * 0 + 136  # a value of zeros
    value[:, :, 3, dim // 2 :] = 0
    query = torch.randn(batch, tokens, heads, dim, device=device).transpose(1, 2)
    there = torch.tensor(length, device=device)
    post_scale = torch.rand(kv_heads, dim, device=device) + 0.5
    arguments = (key, value, None, dim**-0.5, True, post_scale)
    quantize_query = dim != 64  # else 16-bit products of the query as it is
    given = query if quantize_query else query.bfloat16()
    rest = (quantize_query, there, window, False, products)
    found = kv4_attention(given, *arguments, *rest)
    assert found.dtype == given.dtype
    expected = kv4_attention.reference(given.float(), *arguments, *rest)
    assert relative_error(found.float(), expected) < bound


@pytest.mark.parametrize("products", ["exact", pytest.param("fp8", marks=FP8)])
@pytest.mark.parametrize("split", [1, 4])
def test_a_prompt_in_splits(split, products, device, relative_error) -> None:
    from quantkit.kernels.gpu import kv4_prefill
    from quantkit.kernels.gpu.kv4_cache import hidden, readable

    key, value = (_packed((1, 2, 300, 64), "bfloat16", device) for _ in range(2))
    query = torch.randn(1, 4, 40, 64, device=device) * 10
    config = {"BM": 64, "BN": 64, "SPLIT": split, "num_warps": 4, "num_stages": 2}
    caches = (readable(cache, 64, False) for cache in (key, value))
    found = kv4_prefill.attention(
        query, *caches, hidden(None, 1, 4, 40), 0.125, True, None, True, None, 0, products, config
    )
    expected = kv4_attention.reference(query, key, value, None, 0.125, True)
    assert relative_error(found, expected) < (BOUND if products == "exact" else 0.04)


@pytest.mark.parametrize("kind", ["bool", "additive", "per head"])
def test_masks_of_prompts(kind, device, relative_error) -> None:
    key, value = (_packed((2, 1, 90, 64), "bfloat16", device) for _ in range(2))
    query = torch.randn(2, 2, 40, 64, device=device)
    heads = 2 if kind == "per head" else 1
    mask = torch.rand(2, heads, 40, 90, device=device) < 0.6
    mask[:, :, 0] = False  # attends to nothing: zeros
    mask[1, :, :, :70] = False  # left padding over more than a tile
    if kind == "additive":
        mask = torch.where(mask, torch.randn(mask.shape, device=device), -math.inf)
    arguments = (query, key, value, mask, 0.125, False)
    found = kv4_attention(*arguments)
    assert relative_error(found, kv4_attention.reference(*arguments)) < BOUND
    assert not found[:, :, 0].any()


def test_few_queries_with_fp8_weights(device, relative_error) -> None:
    key, value = (_packed((1, 1, 150, 64), "bfloat16", device) for _ in range(2))
    query = torch.randn(1, 2, 1, 64, device=device)
    arguments = (query, key, value, None, 0.125, False, None, True, None, 0, False)
    found, exact = kv4_attention(*arguments, "fp8"), kv4_attention.reference(*arguments)
    assert 5e-3 < relative_error(found, exact) < 0.04
    assert relative_error(found, kv4_attention.reference(*arguments, "fp8")) < 0.03


def test_empty(device) -> None:
    cache = _packed((0, 1, 8, 64), "bfloat16", device)
    assert kv4_attention(
        torch.empty(0, 2, 1, 64, device=device), cache, cache, None, 1.0, False
    ).shape == (0, 2, 1, 64)
    cache = _packed((1, 1, 8, 64), "bfloat16", device)
    assert kv4_attention(
        torch.empty(1, 2, 0, 64, device=device), cache, cache, None, 1.0, False
    ).shape == (1, 2, 0, 64)
    nothing = cache[:, :, :0]
    out = kv4_attention(torch.randn(1, 2, 1, 64, device=device), nothing, nothing, None, 1.0, False)
    assert not out.any()


# More tokens than a program takes, where a program's own work is the same: two layouts by default.
MANY = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dim", "turned"), [(128, 128), (80, 80), (64, 32), (20, 12)])
@pytest.mark.parametrize(
    ("tokens", "extra", "planar"),
    [
        *((1, extra, planar) for extra in (1, 2) for planar in (False, True)),
        (3, 2, False),
        (19, 1, True),
        *(pytest.param(19, *layout, marks=MANY) for layout in ((1, False), (2, False), (2, True))),
    ],
)
def test_append(tokens, extra, planar, dim, turned, dtype, device) -> None:
    query = torch.randn(2, tokens, 4, dim, device=device).to(dtype).transpose(1, 2)
    key, value = (torch.randn(2, 2, tokens, dim, device=device).to(dtype) for _ in range(2))
    angles = torch.rand(2, tokens, turned, device=device) * 6
    caches = [_poison((2, 2, 32, dim // 2 + extra), device) for _ in range(2)]
    again = [cache.clone() for cache in caches]
    positions = torch.randperm(32, device=device)[:tokens]
    factor = torch.rand(2, dim, device=device) + 0.5
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = kv4_append(query, key, value, cos, sin, *caches, positions, factor, planar)
    expected = kv4_append.reference(query, key, value, cos, sin, *again, positions, factor, planar)
    if device.type == "cpu" or dtype != torch.float32:  # where a GPU fuses a product and a sum
        assert torch.equal(out, expected)
        assert torch.equal(caches[0], again[0])
    assert torch.equal(caches[1], again[1])


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 128), (2, 3, 17, 80), (0, 2, 3, 64)])
@pytest.mark.parametrize("scale_dtype", SCALES)
def test_quantize_and_back(scale_dtype, shape, device) -> None:
    x = torch.randn(shape, device=device) * 10
    if x.numel() and x.dim() > 1:
        x.view(-1, shape[-1])[0] = 0
    packed = kv4_quantize(x, scale_dtype)
    assert torch.equal(packed, kv4_quantize.reference(x, scale_dtype))
    if x.dim() == 4:
        for dtype in (torch.bfloat16, torch.float32):
            found = kv4_dequantize(packed, shape[-1], dtype)
            assert torch.equal(found, kv4_dequantize.reference(packed, shape[-1], dtype))
