import math

import pytest
import torch
from quantkit.kernels.quantize_fp8 import quantize_fp8

# Every finite e4m3 number, from its definition: 2^-9 * m, and (8 + m) / 8 * 2^(e - 7).
_GRID = sorted(
    {m * 2.0**-9 for m in range(8)}
    | {(8 + m) / 8 * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)}
)


def _round(value: float) -> float:
    """The nearest grid number, ties to the even mantissa (every other grid number)."""
    size = min(abs(value), 448.0)
    best = min(range(len(_GRID)), key=lambda i: (abs(_GRID[i] - size), i % 2))
    return math.copysign(_GRID[best], value)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_the_definition(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 128) * torch.logspace(-3, 2, 128)).to(dtype)
    values, scale = quantize_fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    for row in range(len(x)):
        t = x[row].abs().max().float() / 448
        assert scale[row].item() == t.item()
        quotients = (x[row].float() / t).tolist()
        assert values[row].float().tolist() == [_round(v) for v in quotients]


@pytest.mark.usefixtures("backend")
def test_ties_round_to_even() -> None:
    x = torch.tensor([[448.0, 17.0, 19.0, 21.0, 2.0**-10, 3 * 2.0**-10]])
    values, scale = quantize_fp8(x)
    assert scale.item() == 1.0
    assert values[0].float().tolist() == [448.0, 16.0, 20.0, 20.0, 0.0, 2.0**-8]


@pytest.mark.usefixtures("backend")
def test_zeros_and_extremes() -> None:
    x = torch.zeros(3, 128)
    x[1, 0], x[2] = 1e-40, 3e38
    values, scale = quantize_fp8(x)
    assert values.float().isfinite().all()
    assert scale.isfinite().all()
    assert values[0].float().count_nonzero() == 0
    assert values[2].float().eq(448).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(1, 128), (0, 128), (2, 3, 64), (128,), (3, 14336)])
def test_shapes(shape: tuple[int, ...]) -> None:
    values, scale = quantize_fp8(torch.randn(shape))
    assert values.shape == shape
    assert scale.shape == (*shape[:-1], 1)


@pytest.mark.usefixtures("backend")
def test_non_contiguous() -> None:
    x = torch.randn(128, 7).t()
    for got, expected in zip(quantize_fp8(x), quantize_fp8(x.contiguous())):
        assert torch.equal(got.float(), expected.float())


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.quantkit.quantize_fp8.default, (torch.randn(2, 3, 128),))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"int32 \(2, 8\)"):
        quantize_fp8(torch.zeros(2, 8, dtype=torch.int32))
