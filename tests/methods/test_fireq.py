import pytest
import torch

from quantkit.methods.fireq import (
    attention_error,
    constant_factor,
    kv4_fake_quantize,
    pair_magnitude,
    rope_post_factor,
    rope_pre_factor,
)


def rope(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Half-split RoPE, written out."""
    dim = x.shape[-1]
    out = x.clone()
    for i in range(dim // 2):
        angle = positions * 10000 ** (-2 * i / dim)
        a, b = x[..., i], x[..., i + dim // 2]
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + dim // 2] = b * angle.cos() + a * angle.sin()
    return out


KEYS = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
POSITIONS = torch.arange(50, dtype=torch.float64)


def test_a_pairs_magnitude_does_not_turn():
    before, after = pair_magnitude(KEYS), pair_magnitude(rope(KEYS, POSITIONS))
    assert torch.allclose(before, after)
    want = max(float((KEYS[1, t, 3] ** 2 + KEYS[1, t, 11] ** 2) ** 0.5) for t in range(50))
    assert float(before[1, 3]) == float(before[1, 11]) == pytest.approx(want)


def test_the_pre_factor_commutes_with_rope():
    a = rope_pre_factor(pair_magnitude(KEYS), 2.0).double()
    assert torch.allclose(rope(KEYS * a[:, None], POSITIONS), rope(KEYS, POSITIONS) * a[:, None])
    assert torch.allclose(pair_magnitude(KEYS * a[:, None]), torch.full((2, 16), 2.0), rtol=1e-5)


def test_both_members_of_a_pair_get_the_larger_ones_factor():
    a = rope_pre_factor(torch.tensor([[1.0, 8.0, 4.0, 2.0]]), 2.0)
    assert a.tolist() == [[0.5, 0.25, 0.5, 0.25]]
    with pytest.raises(ValueError, match="3 channels"):
        rope_pre_factor(torch.ones(1, 3), 1.0)
    with pytest.raises(ValueError, match="top_k"):
        rope_post_factor(torch.ones(1, 4), 1.0, 5)


def test_the_post_factor_takes_outliers_and_their_partners():
    absmax = torch.ones(2, 16)
    absmax[0, [2, 9]] = torch.tensor([30.0, 50.0])
    absmax[1, 15] = 20.0
    b, taken = rope_post_factor(absmax, 1.5, 2)
    assert taken[0].nonzero().flatten().tolist() == [1, 2, 9, 10]
    assert bool(taken[1, 15])
    assert bool(taken[1, 7])
    for head in range(2):
        for i in range(16):
            want = 1.5 / float(absmax[head, i]) if taken[head, i] else 1.0
            assert float(b[head, i]) == pytest.approx(want)


def test_zeros_are_harmless():
    zero = torch.zeros(1, 16)
    assert torch.all(torch.isfinite(rope_pre_factor(zero, 1.0)))
    assert torch.all(torch.isfinite(rope_post_factor(zero, 1.0, 3)[0]))
    assert torch.all(torch.isfinite(constant_factor(torch.tensor([0.0, 1.0]), 0.01)))


def test_the_constant_factor():
    d = constant_factor(torch.tensor([0.5, 2.0]), 0.01)
    assert float(d[0] / d[1]) == pytest.approx(4.0)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_kv4(scale_dtype: torch.dtype):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    got = kv4_fake_quantize(x, scale_dtype)
    for row in range(6):
        largest = max(x[row].tolist(), key=abs)
        scale = float(torch.tensor(-largest / 8).to(scale_dtype))
        for j in range(64):
            code = min(max(round(float(x[row, j]) / scale), -8), 7)
            assert float(got[row, j]) == pytest.approx(code * scale, abs=1e-5)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_kv4_of_nothing_and_of_too_much(scale_dtype: torch.dtype):
    assert torch.equal(kv4_fake_quantize(torch.zeros(2, 8), scale_dtype), torch.zeros(2, 8))
    huge = kv4_fake_quantize(torch.full((1, 8), 1e6), scale_dtype)
    # e4m3's largest scale is 448; more saturates.
    assert float(huge[0, 0]) == (
        448 * 8 if scale_dtype != torch.bfloat16 else pytest.approx(1e6, rel=0.01)
    )
    with pytest.raises(ValueError, match="float32"):
        kv4_fake_quantize(torch.ones(2, 8), torch.float32)


def test_scaled_keys_lose_less():
    """What the factors are for: keys with outlier channels, rounded to INT4 per token."""
    keys = KEYS.clone()
    keys[..., [3, 11, 6]] *= 40
    rotated = rope(keys, POSITIONS)
    query = torch.randn(2, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    query[..., [3, 11, 6]] /= 40
    want = query @ rotated.transpose(1, 2)

    def error(factor: torch.Tensor) -> float:
        rounded = kv4_fake_quantize((rotated * factor).float(), torch.bfloat16).double()
        return float(((query / factor) @ rounded.transpose(1, 2) - want).norm())

    b, taken = rope_post_factor(rotated.abs().amax(1), 1.0, 3)
    a = rope_pre_factor(pair_magnitude(rotated), 1.0)
    both = torch.where(taken, b, a).double()[:, None]
    assert error(both) < 0.25 * error(torch.ones_like(both))


def test_less_strength_balances_less():
    whole = rope_pre_factor(torch.tensor([[1.0, 8.0, 4.0, 2.0]]), 2.0)
    half = rope_pre_factor(torch.tensor([[1.0, 8.0, 4.0, 2.0]]), 2.0, 0.5)
    assert torch.allclose(half, whole.sqrt())


def test_attentions_error_is_that_of_a_token_at_a_time():
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, h, 7, 16, generator=generator) for h in (4, 2, 2))
    key[..., 5] *= 20
    factor = torch.rand(2, 16, generator=generator) + 0.5
    want = 0.0
    for head in range(4):
        d = factor[head // 2]
        k, v = key[0, head // 2], value[0, head // 2]
        k4 = kv4_fake_quantize(k * d, torch.bfloat16)
        v4 = kv4_fake_quantize(v, torch.bfloat16)
        for t in range(7):
            q = query[0, head, t]
            s = (q / d).abs().max() / 448
            q8 = (q / d / s).to(torch.float8_e4m3fn).float() * s
            exact = (k[: t + 1] @ q / 4).softmax(0) @ v[: t + 1]
            rounded = (k4[: t + 1] @ q8 / 4).softmax(0) @ v4[: t + 1]
            want += float((rounded - exact).square().sum())
    got = attention_error(query, key, value, factor, torch.bfloat16)
    assert got == pytest.approx(want, rel=1e-4)
    balanced = rope_pre_factor(pair_magnitude(key[0]), 1.0)
    assert attention_error(query, key, value, balanced, torch.bfloat16) < 0.9 * got
