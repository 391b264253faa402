import pytest
import torch
from quantkit.kernels.hadamard import hadamard
from quantkit.kernels.hadamard_matrices import hadamard_matrix


def _slow(x: torch.Tensor, block: int) -> torch.Tensor:
    """Entry (i, j) of the Sylvester matrix is (-1)^popcount(i & j)."""
    signs = torch.tensor(
        [[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)],
        dtype=torch.float64,
    )
    blocks = x.double().reshape(-1, block)
    return (blocks @ signs / block**0.5).reshape(x.shape)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((1, 128), 128),
        ((3, 1024), 512),
        ((3, 384), 128),
        ((0, 128), 128),
        ((2, 3, 64), 16),
        ((3, 5), 1),
        ((1, 14336), 128),
        ((512,), 256),
    ],
)
def test_against_the_definition(shape: tuple[int, ...], block: int, relative_error) -> None:
    x = torch.randn(shape)
    assert relative_error(hadamard(x, block), _slow(x, block)) < 1e-6


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_half_precision(dtype: torch.dtype, bound: float, relative_error) -> None:
    x = torch.randn(5, 256).to(dtype)
    y = hadamard(x)
    assert y.dtype == dtype
    assert relative_error(y, _slow(x, 128)) < bound


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("block", [128, 512])
def test_is_its_own_inverse_and_keeps_the_norm(block: int) -> None:
    x = torch.randn(4, 1024)
    torch.testing.assert_close(hadamard(hadamard(x, block), block), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hadamard(x, block).norm(), x.norm())


@pytest.mark.usefixtures("backend")
def test_non_contiguous() -> None:
    x = torch.randn(128, 7).t()
    torch.testing.assert_close(hadamard(x), hadamard(x.contiguous()))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.quantkit.hadamard.default, (torch.randn(2, 3, 128), 64))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"multiple of 128.*\(2, 192\)"):
        hadamard(torch.zeros(2, 192))
    with pytest.raises(ValueError, match=r"power of two, .* got 92"):
        hadamard(torch.zeros(2, 184), 92)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("block", [12, 96, 896, 1536])
def test_known_orders(block: int, relative_error) -> None:
    x = torch.randn(3, 2 * block)
    matrix = hadamard_matrix(block, torch.device("cpu")).double()
    assert torch.equal(matrix @ matrix.t(), block * torch.eye(block, dtype=torch.float64))
    y = hadamard(x, block)
    expected = (x.double().view(-1, block) @ matrix / block**0.5).view(x.shape)
    assert relative_error(y, expected) < 1e-6
    assert relative_error(hadamard(y, block, transpose=True), x) < 1e-6
