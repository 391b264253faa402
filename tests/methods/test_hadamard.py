import pytest
import torch
from quantkit.kernels.hadamard import hadamard
from quantkit.kernels.hadamard_matrices import hadamard_matrix

from quantkit.methods.hadamard import (
    known_block,
    random_signs,
    rotate,
    rotate_hessian,
    widest_block,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("block", [128, 12, 28 * 4, 384])
def test_rotating_both_sides_leaves_the_product(block: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 2 * block, generator=generator, dtype=torch.float64)
    w = torch.randn(5, 2 * block, generator=generator, dtype=torch.float64)
    a, b = rotate(x, block), rotate(w, block)
    assert torch.allclose(a @ b.T, x @ w.T, atol=1e-10)
    assert not torch.allclose(a, x)
    assert torch.allclose(rotate(a, block, inverse=True), x, atol=1e-10)
    assert torch.allclose(rotate_hessian(x.T @ x, block), a.T @ a, atol=1e-9)
    with pytest.raises(ValueError, match=str(2 * block)):
        rotate(x, 4 * block)


def test_it_spreads_an_outlier():
    x = torch.zeros(1, 128)
    x[0, 5] = 128**0.5
    assert torch.allclose(rotate(x, 128).abs(), torch.ones(1, 128))


@pytest.mark.parametrize("block", [1, 8, 128, 256, 1024, 12, 20, 28, 36, 44, 52, 60, 768, 28 * 256])
def test_every_block_is_multiplied_by_the_matrix(block: int):
    """Also the blocks that are rotated in several steps; and as the kernels do it."""
    x = torch.randn(2, 3, 2 * block, generator=torch.Generator().manual_seed(1))
    matrix = hadamard_matrix(block, CPU).double()
    want = torch.cat([part.double() @ matrix / block**0.5 for part in x.split(block, -1)], -1)
    got = rotate(x, block)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, atol=1e-5)
    assert torch.allclose(hadamard(x, block).double(), want, atol=1e-5)


def test_which_blocks_there_are():
    widths = {
        4096: 4096,
        14336: 14336,
        3584: 3584,
        4864: 4864,
        11008: 256,
        384: 384,
        200: 200,
        6: 2,
    }
    assert {k: widest_block(k) for k in widths} == widths
    assert not any(known_block(n) for n in (0, 3, 6, 92, 11008))
    with pytest.raises(ValueError, match="order 6 is known"):
        rotate(torch.zeros(12), 6)


def test_a_hessian_that_is_not_quite_symmetric():
    h = torch.randn(24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for block in (8, 12):
        matrix = hadamard_matrix(block, CPU).double()
        r = torch.block_diag(*[matrix] * (24 // block)) / block**0.5
        assert torch.allclose(rotate_hessian(h, block), r.T @ h @ r)


def test_signs_are_half_and_half_and_the_same_every_time():
    signs = random_signs(4096, seed=3)
    assert torch.equal(signs.abs(), torch.ones(4096))
    assert abs(float(signs.mean())) < 0.1
    assert torch.equal(signs, random_signs(4096, seed=3))
    assert not torch.equal(signs, random_signs(4096, seed=4))
