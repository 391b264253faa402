import math

import pytest
import torch
from quantkit.kernels.kv4 import kv4_dequantize, kv4_quantize, planes
from quantkit.kernels.kv4_attention import kv4_attention

BOUND = {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 2e-3}
# batch, query heads, KV heads, tokens, length, head_dim
SHAPES = [
    (2, 4, 2, 1, 9, 64),
    (1, 6, 2, 5, 5, 32),
    (1, 8, 8, 3, 17, 128),
    (2, 4, 1, 7, 33, 64),
    (1, 2, 1, 0, 4, 32),
]


def _slow(query, key, value, mask, scaling, is_causal, post_scale=None, quantize_query=True):
    """One query at a time, in float64."""
    batch, heads, tokens, dim = query.shape
    length, group = key.shape[2], heads // key.shape[1]
    k = kv4_dequantize(key, dim, torch.float32).double()
    v = kv4_dequantize(value, dim, torch.float32).double()
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                q = query[b, h, t].float()
                if post_scale is not None:
                    q = q / post_scale[h // group]
                if quantize_query:
                    scale = q.abs().max() / 448
                    q = (q / scale).to(torch.float8_e4m3fn).float() * scale
                scores = k[b, h // group] @ q.double() * scaling
                if mask is None and is_causal:
                    scores[length - tokens + t + 1 :] = -math.inf
                elif mask is not None:
                    row = mask[b % len(mask), h % mask.shape[1], t]
                    if row.dtype == torch.bool:
                        scores[~row] = -math.inf
                    else:
                        scores += row.double()
                if scores.max() > -math.inf:
                    out[b, h, t] = scores.softmax(0) @ v[b, h // group]
    return out


def _inputs(shape, dtype=torch.float32, scale_dtype="bfloat16"):
    batch, heads, kv_heads, tokens, length, dim = shape
    query = torch.randn(batch, heads, tokens, dim).to(dtype)
    key, value = (
        kv4_quantize(torch.randn(batch, kv_heads, length, dim), scale_dtype) for _ in range(2)
    )
    return query, key, value


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("quantize_query", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("shape", SHAPES)
def test_against_loops(shape, dtype, is_causal, quantize_query, relative_error) -> None:
    arguments = (*_inputs(shape, dtype), None, shape[-1] ** -0.5, is_causal, None, quantize_query)
    y = kv4_attention(*arguments)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y, _slow(*arguments)) < BOUND[dtype]


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("length", [100, 160])
def test_prompts_in_bf16(length, window, masked, planar, relative_error) -> None:
    """Enough queries for what attends over expanded keys: in C++ without a mask, by torch with one."""
    query, *packed = _inputs((2, 4, 2, 100, length, 32), torch.bfloat16)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 100, length) < 0.5
        mask[..., 0] = True
    settings = {"window": 0 if masked else window}
    want = kv4_attention.reference(query.float(), *packed, mask, 0.2, True, **settings)
    if planar:
        packed = [_planar(x, 32) for x in packed]
    y = kv4_attention(query, *packed, mask, 0.2, True, planar=planar, **settings)
    assert y.is_contiguous()
    assert relative_error(y, want.double()) < BOUND[torch.bfloat16]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["bool", "additive", "shared", "per head"])
def test_masks(kind: str, relative_error) -> None:
    shape = (2, 4, 2, 5, 9, 32)
    mask = torch.rand(1 if kind == "shared" else 2, 4 if kind == "per head" else 1, 5, 9) < 0.7
    mask[..., 0] = True
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    # With a mask, is_causal says nothing more.
    arguments = (*_inputs(shape), mask, 32**-0.5, True)
    assert relative_error(kv4_attention(*arguments), _slow(*arguments)) < 1e-4


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "-inf", "smallest"])
def test_a_row_that_is_masked_entirely_is_finite(kind: str, dtype: torch.dtype) -> None:
    keep = torch.ones(2, 1, 3, 9, dtype=torch.bool)
    keep[0, :, 0] = False
    low = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
    mask = keep if kind == "bool" else torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, low)
    y = kv4_attention(*_inputs((2, 4, 2, 3, 9, 32), dtype), mask, 0.2, False)
    assert y.isfinite().all()
    if kind != "smallest":
        assert y[0, :, 0].count_nonzero() == 0
    assert y[1].count_nonzero() > 0


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float8_e4m3fn"])
def test_post_scale_cancels(scale_dtype: str, relative_error) -> None:
    """Keys times b and queries over b: the scores are those of plain keys, up to rounding."""
    query, key = torch.randn(2, 4, 3, 64), torch.randn(2, 2, 40, 64)
    value = kv4_quantize(torch.randn(2, 2, 40, 64), scale_dtype)
    post_scale = torch.ones(2, 64)
    post_scale[0, 3], post_scale[1, 7] = 0.25, 0.5
    packed = kv4_quantize(key * post_scale[:, None], scale_dtype)
    arguments = (query, packed, value, None, 0.125, False, post_scale)
    assert relative_error(kv4_attention(*arguments), _slow(*arguments)) < 1e-4
    plain = torch.nn.functional.scaled_dot_product_attention(
        query, key, kv4_dequantize(value, 64, torch.float32), enable_gqa=True, scale=0.125
    )
    assert relative_error(kv4_attention(*arguments), plain) < 0.25


@pytest.mark.usefixtures("backend")
def test_non_contiguous(relative_error) -> None:
    query, key, value = _inputs((2, 4, 2, 3, 9, 32))
    expected = kv4_attention(query, key, value, None, 0.2, True)
    strided = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    assert relative_error(kv4_attention(*strided, None, 0.2, True), expected) < 1e-6


@pytest.mark.parametrize("tokens", [1, 9])
def test_opcheck(tokens: int) -> None:
    query, key, value = _inputs((2, 4, 2, tokens, 9, 32), torch.bfloat16)
    arguments = (query, key, value, None, 0.2, True, torch.ones(2, 32))
    torch.library.opcheck(torch.ops.quantkit.kv4_attention.default, arguments)


def test_bad_input() -> None:
    query, key, value = _inputs((2, 4, 2, 3, 9, 32))
    for arguments, message in [
        ((query[0], key, value, None, 0.2, False), r"query must be \[B, Hq, T, D\].*\(4, 3, 32\)"),
        ((query, key[:, :, :8], value, None, 0.2, False), r"key \(2, 2, 8, 18\)"),
        ((query[:, :3], key, value, None, 0.2, False), "Hkv divide Hq"),
        ((query, key[..., :16], value, None, 0.2, False), "packed must be uint8"),
        ((query, key, value, torch.ones(3, 8), 0.2, False), r"mask must be.*\(3, 8\)"),
        ((query, key, value, None, 0.2, False, torch.ones(32)), r"post_scale.*\(32,\)"),
        ((query, key[:, :, :2], value[:, :, :2], None, 0.2, True), "needs T <= S"),
    ]:
        with pytest.raises(ValueError, match=message):
            kv4_attention(*arguments)


def _planar(cache, dim):
    """The same vectors, codes first."""
    out = torch.empty_like(cache)
    codes, scales = planes(out, dim, True)
    codes.copy_(cache[..., : dim // 2])
    scales.copy_(cache[..., dim // 2 :])
    return out


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("masked", ["none", "causal", "bool"])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_static_cache(scale_dtype, masked, tokens, relative_error) -> None:
    """Only the first `length` keys count, in either layout."""
    query, key, value = _inputs((2, 4, 2, tokens, 64, 64), scale_dtype=scale_dtype)
    length, mask = 47, None
    if masked == "bool":
        mask = torch.rand(2, 1, tokens, 64) < 0.7
        mask[..., 0] = True
    cut = None if mask is None else mask[..., :length]
    wanted = _slow(
        query, key[:, :, :length], value[:, :, :length], cut, 0.2, masked == "causal", None, False
    )
    for planar in (False, True):
        k, v = (_planar(t, 64) if planar else t for t in (key, value))
        out = kv4_attention(
            query,
            k,
            v,
            mask,
            0.2,
            masked == "causal",
            None,
            False,
            torch.tensor([length]),
            0,
            planar,
        )
        assert relative_error(out, wanted) < 1e-4


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("tokens", "length"), [(1, 30), (7, 30), (30, 30)])
@pytest.mark.parametrize("window", [1, 8, 30, 100])
def test_a_sliding_window(window, tokens, length, relative_error) -> None:
    query, key, value = _inputs((1, 4, 2, tokens, length, 64))
    place = torch.arange(length) - (length - tokens + torch.arange(tokens))[:, None]
    mask = ((place <= 0) & (place > -window))[None, None]
    wanted = _slow(query, key, value, mask, 0.2, False, None, False)
    out = kv4_attention(query, key, value, None, 0.2, True, None, False, None, window)
    assert relative_error(out, wanted) < 1e-4
