import pytest
import torch

from quantkit.methods.hadamard import hadamard_matrix, rotate, rotate_hessian


@pytest.mark.parametrize("n", [1, 2, 4, 64, 128])
def test_the_matrix_is_hadamards(n: int):
    h = hadamard_matrix(n)
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=h.dtype))
    for i in range(0, n, max(1, n // 8)):
        for j in range(n):
            assert float(h[i, j]) == (-1) ** (i & j).bit_count()


@pytest.mark.parametrize("n", [0, 3, 12])
def test_other_orders_are_refused(n: int):
    with pytest.raises(ValueError, match=str(n)):
        hadamard_matrix(n)


def test_rotating_both_sides_leaves_the_product():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 384, generator=generator, dtype=torch.float64)
    w = torch.randn(5, 384, generator=generator, dtype=torch.float64)
    a, b = rotate(x, 128), rotate(w, 128)
    assert torch.allclose(a @ b.T, x @ w.T, atol=1e-10)
    assert not torch.allclose(a, x)
    assert torch.allclose(rotate(a, 128), x, atol=1e-10)
    assert torch.allclose(rotate_hessian(x.T @ x, 128), a.T @ a, atol=1e-9)
    with pytest.raises(ValueError, match="384"):
        rotate(x, 256)


def test_it_spreads_an_outlier():
    x = torch.zeros(1, 128)
    x[0, 5] = 128**0.5
    assert torch.allclose(rotate(x, 128).abs(), torch.ones(1, 128))


@pytest.mark.parametrize("block", [1, 8, 128, 256, 1024])
def test_every_block_is_multiplied_by_the_matrix(block: int):
    """Also the blocks that are rotated in two steps."""
    x = torch.randn(2, 3, 2 * block, generator=torch.Generator().manual_seed(1))
    want = [part.double() @ hadamard_matrix(block) / block**0.5 for part in x.split(block, -1)]
    got = rotate(x, block)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), torch.cat(want, -1), atol=1e-5)


def test_a_hessian_that_is_not_quite_symmetric():
    h = torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    r = torch.block_diag(hadamard_matrix(8), hadamard_matrix(8)) / 8**0.5
    assert torch.allclose(rotate_hessian(h, 8), r.T @ h @ r)
