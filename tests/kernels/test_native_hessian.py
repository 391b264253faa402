import pytest
import torch
from quantkit.kernels.cpu import hessian, native

pytestmark = pytest.mark.skipif(native.level() == 0, reason="no C++ compiler, or no AVX-512-BF16")


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "level", lambda: 1)


@pytest.mark.parametrize(
    ("tokens", "columns", "strip"),
    [
        (1, 17, 16),
        (64, 48, 16),
        (37, 256, 64),
        (333, 300, 256),
        (120, 600, 256),
        (1100, 48, 16),
        (0, 32, 16),
    ],
)
def test_products_of_rounded_inputs(tokens: int, columns: int, strip: int) -> None:
    """Added to what is there, from the strips' diagonal blocks to the right."""
    generator = torch.Generator().manual_seed(0)
    # Rows further apart than they are long.
    x = torch.randn(tokens, 2 * columns, generator=generator)[:, columns:]
    got = torch.full((columns, columns), 7.0)
    assert hessian.accumulate(got, x, strip)
    rounded = x.bfloat16().double()
    want = 7 + 2 * rounded.T @ rounded
    for first in range(0, columns, strip):
        rows = slice(first, first + strip)
        torch.testing.assert_close(
            got[rows, first:].double(), want[rows, first:], rtol=1e-5, atol=1e-4
        )


def test_threads_change_nothing() -> None:
    x = torch.randn(200, 520, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.zeros(520, 520))
            assert hessian.accumulate(found[-1], x, 256)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].triu(), found[1].triu())


def test_what_it_does_not_take_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, x = torch.zeros(32, 32), torch.randn(10, 32)
    assert not hessian.accumulate(sums, x.double(), 16)
    assert not hessian.accumulate(sums, torch.randn(32, 10).T, 16)
    monkeypatch.setattr(native, "level", lambda: 2)
    assert not hessian.accumulate(sums, x, 16)
    assert not sums.any()
