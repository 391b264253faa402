import pytest
import torch
from quantkit.kernels.quantize_int8 import quantize_int8


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_loops(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 129).to(dtype)
    codes, scale = quantize_int8(x, bits)
    top = 2 ** (bits - 1) - 1
    for row in range(len(x)):
        t = x[row].abs().max().float() / (127 if bits == 8 else 7.5)
        assert scale[row].item() == t.item()
        # Python's round() is half to even.
        expected = [max(-top, min(top, round(v))) for v in (x[row].float() / t).tolist()]
        assert codes[row].tolist() == expected
    assert codes.abs().max() == top


@pytest.mark.usefixtures("backend")
def test_four_bits_reach_half_a_step_beyond_the_largest_code() -> None:
    """The largest number lies on a border, which its last bit does not decide: it has the last code on either side."""
    x = torch.tensor([[7.5, -7.5, 7.4, 6.5, 5.5, 0.5], [-15.0, 14.9, 1.0, 3.0, 0.0, 13.0]])
    codes, scale = quantize_int8(x, 4)
    assert scale.tolist() == [[1.0], [2.0]]
    assert codes.tolist() == [[7, -7, 7, 6, 6, 0], [-7, 7, 0, 2, 0, 6]]


@pytest.mark.usefixtures("backend")
def test_ties_round_to_even_and_zeros_are_safe() -> None:
    codes, scale = quantize_int8(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6]))
    assert scale[0].item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scale.isfinite().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(1, 128), (0, 128), (2, 3, 64), (3, 14336)])
def test_shapes(shape: tuple[int, ...]) -> None:
    codes, scale = quantize_int8(torch.randn(shape))
    assert codes.shape == shape
    assert scale.shape == (*shape[:-1], 1)


@pytest.mark.usefixtures("backend")
def test_non_contiguous() -> None:
    x = torch.randn(128, 7).t()
    for got, expected in zip(quantize_int8(x), quantize_int8(x.contiguous())):
        assert torch.equal(got, expected)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.quantkit.quantize_int8.default, (torch.randn(2, 3, 128), 4))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 5"):
        quantize_int8(torch.zeros(2, 8), 5)
    with pytest.raises(ValueError, match=r"int8 \(2, 8\)"):
        quantize_int8(torch.zeros(2, 8, dtype=torch.int8))
