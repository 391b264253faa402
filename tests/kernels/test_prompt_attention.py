"""Our attention of prompts on processors without AMX, beside the definition in float64."""

import pytest
import torch
from quantkit.kernels.cpu import native, prompt_attention
from quantkit.kernels.cpu.prompt_attention import attend

pytestmark = pytest.mark.skipif(native.level() == 0, reason="no C++ compiler, or no AVX-512-BF16")


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level", lambda: 1)


def inputs(
    batch: int, tokens: int, length: int, heads: int, kv_heads: int, dim: int, size: float = 1
):
    """As transformers gives them: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, n, h, dim, generator=generator) * size).bfloat16().transpose(1, 2)
        for n, h in ((tokens, heads), (length, kv_heads), (length, kv_heads))
    ]


SHAPES = pytest.mark.parametrize(
    ("batch", "tokens", "length", "heads", "kv_heads", "dim"),
    [
        (2, 100, 333, 6, 3, 80),
        (1, 16, 16, 1, 1, 16),
        (1, 17, 17, 2, 1, 48),
        (3, 64, 384, 4, 4, 64),
        (1, 401, 801, 2, 1, 128),
        (1, 300, 300, 2, 1, 256),
        (1, 31, 1200, 2, 2, 96),
    ],
)


def definition(query, key, value, scaling: float, window: int = 0) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    tokens, length = query.shape[2], key.shape[2]
    last = torch.arange(length - tokens, length)[:, None]
    seen = torch.arange(length)[None] <= last
    if window:
        seen &= torch.arange(length)[None] > last - window
    scores = query.double() @ key.mT * scaling
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@SHAPES
@pytest.mark.parametrize("window", [0, 1, 33, 500])
def test_it_is_attention(batch, tokens, length, heads, kv_heads, dim, window):
    given = inputs(batch, tokens, length, heads, kv_heads, dim)
    got = attend(*given, dim**-0.5, window)
    want = definition(*given, dim**-0.5, window)
    assert got is not None
    assert got.shape == want.shape
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() <= 4e-3 * want.norm()
    assert float((got - want).abs().max()) < 0.03


def gradients(attention, given, weight):
    leaves = [x.detach().clone().requires_grad_() for x in given]
    return torch.autograd.grad((attention(*leaves) * weight).sum(), leaves)


def apart(got, want) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@SHAPES
@pytest.mark.parametrize("window", [0, 33])
def test_gradients_are_those_of_attention(batch, tokens, length, heads, kv_heads, dim, window):
    given = inputs(batch, tokens, length, heads, kv_heads, dim)
    weight = torch.randn(
        batch, tokens, heads, dim, generator=torch.Generator().manual_seed(2)
    ).bfloat16()
    got = gradients(lambda *x: attend(*x, dim**-0.5, window), given, weight)
    want = gradients(lambda *x: definition(*x, dim**-0.5, window), given, weight.double())
    for mine, exact, x in zip(got, want, given):
        assert mine.shape == x.shape
        assert mine.dtype == torch.bfloat16
        assert apart(mine, exact) <= 5e-3
    # What nobody sees gets nothing, and nothing else: no number that lay in the memory before.
    for mine, exact in zip(got[1:], want[1:]):
        unseen = exact.abs().sum(-1) == 0
        assert float(mine[unseen].abs().sum()) == 0


def test_gradients_of_scores_that_exp_cannot_take():
    given = inputs(1, 700, 700, 2, 1, 64, size=8)
    weight = torch.ones((), dtype=torch.bfloat16)
    got = gradients(lambda *x: attend(*x, 1.0), given, weight)
    want = gradients(lambda *x: definition(*x, 1.0), given, weight.double())
    assert all(torch.isfinite(x).all() for x in got)
    assert apart(got[2], want[2]) <= 5e-3


def test_second_gradients_are_refused():
    """Rather than be zeros: what C++ computes has no graph."""
    query, key, value = inputs(1, 40, 40, 4, 2, 32)
    leaf = query.requires_grad_()
    out = attend(leaf, key, value, 0.2)
    assert out is not None
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_defaults_of_torch_change_nothing():
    given = inputs(1, 40, 40, 4, 2, 32)
    weight = torch.ones((), dtype=torch.bfloat16)
    want = gradients(lambda *x: attend(*x, 0.2), given, weight)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = gradients(lambda *x: attend(*x, 0.2), given, weight)
        with torch.device("meta"):
            again = gradients(lambda *x: attend(*x, 0.2), given, weight)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    assert all(torch.equal(x, y) for x, y in zip(again, want))


def test_gradients_go_through_the_rounding_to_float32_leaves():
    """Keys that come in float32, as RoPE gives them under autocast; only one of the three wants a gradient."""
    query, key, value = inputs(1, 40, 40, 4, 2, 32)
    leaf = key.float().requires_grad_()
    out = attend(query, leaf, value, 0.2)
    assert out is not None
    out.float().square().sum().backward()
    again = key.double().requires_grad_()
    definition(query, again, value, 0.2).square().sum().backward()
    assert leaf.grad is not None
    assert again.grad is not None
    assert leaf.grad.dtype == torch.float32
    assert apart(leaf.grad, again.grad) <= 1e-2


def test_scores_that_exp_cannot_take():
    """Thousands apart, the largest ones first and last: rows end at one key each, none at NaN."""
    query, key, value = inputs(1, 700, 700, 2, 1, 64, size=30)
    got = attend(query, key, value, 1.0)
    want = definition(query, key, value, 1.0)
    assert got is not None
    assert torch.isfinite(got).all()
    assert (got - want).norm() <= 4e-3 * want.norm()


def test_heads_and_rows_that_lie_apart():
    """Parts of a fused projection, and an odd row length, which is copied."""
    whole = torch.randn(2, 40, 8 * 32 + 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    query = whole[..., : 4 * 32].unflatten(-1, (4, 32)).transpose(1, 2)
    key, value = (
        whole[..., at : at + 64].unflatten(-1, (2, 32)).transpose(1, 2) for at in (128, 192)
    )
    got, want = attend(query, key, value, 0.2), definition(query, key, value, 0.2)
    assert got is not None
    assert (got - want).norm() <= 4e-3 * want.norm()


def test_threads_change_nothing():
    given, before, found = inputs(2, 130, 200, 4, 2, 64), torch.get_num_threads(), []
    weight = torch.ones((), dtype=torch.bfloat16)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            back = gradients(lambda *x: attend(*x, 0.125), given, weight)
            found.append((attend(*given, 0.125), *back))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_what_it_does_not_take_is_left_to_torch(monkeypatch):
    query, key, value = inputs(1, 20, 20, 2, 1, 32)
    found = attend(query, key, value, 1.0)
    assert found is not None
    assert torch.equal(attend(query, key.float(), value, 1.0), found)  # rounded
    assert attend(query.float(), key, value, 1.0) is None
    assert attend(*inputs(1, 20, 20, 2, 1, 40), 1.0) is None  # heads of 40
    assert attend(query[:, :, :15], key, value, 1.0) is None  # a few queries
    assert (
        attend(query, key[:, :, :19], value[:, :, :19], 1.0) is None
    )  # of which no keys are there
    assert attend(query[:0], key[:0], value[:0], 1.0) is None
    odd = inputs(1, 20, 20, 5, 2, 32)
    assert attend(*odd, 1.0) is None  # five heads of queries, two of keys
    assert attend(query, key, value[:, :, :19], 1.0) is None
    monkeypatch.setattr(native, "level", lambda: 2)
    assert attend(query, key, value, 1.0) is None


def test_missing_memory_is_told(monkeypatch):
    class Full:
        def quantkit_prompt_attention(self, *arguments: object) -> int:
            return 1

        def quantkit_prompt_attention_backward(self, *arguments: object) -> int:
            return 1

    given = inputs(1, 20, 20, 2, 1, 32)
    out = prompt_attention.attend(given[0].requires_grad_(), *given[1:], 1.0)
    monkeypatch.setattr(native, "library", Full)
    with pytest.raises(MemoryError, match=r"\(1, 1, 20, 32\)"):
        prompt_attention.attend(*given, 1.0)
    with pytest.raises(MemoryError, match=r"gradients.*\(1, 1, 20, 32\)"):
        out.float().sum().backward()
