import pytest
import torch
from quantkit.kernels.hadamard_matrices import hadamard_matrix, split_order

CPU = torch.device("cpu")
KNOWN = [
    12,
    20,
    24,
    28,
    36,
    40,
    44,
    48,
    52,
    56,
    60,
    68,
    72,
    76,
    80,
    84,
    96,
    100,
    104,
    108,
    112,
    140,
]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 128, *KNOWN, 5120 // 16, 14336 // 8])
def test_rows_are_orthogonal(n: int) -> None:
    matrix = hadamard_matrix(n, CPU)
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.t(), n * torch.eye(n))


@pytest.mark.parametrize(
    "width", [2560, 3072, 4096, 5120, 6912, 8960, 13824, 14336, 18944, 27648, 28672]
)
def test_the_widths_of_models_have_one(width: int) -> None:
    found = split_order(width)
    assert found is not None
    assert found[0] * found[1] == width
    assert found[0] <= 300


@pytest.mark.parametrize("n", [0, -4, 3, 6, 10, 92, 4 * 23])
def test_unknown_orders(n: int) -> None:
    assert split_order(n) is None
    with pytest.raises(ValueError, match=f"order {n}"):
        hadamard_matrix(n, CPU)
