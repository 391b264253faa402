import math

import pytest
import torch
from quantkit.kernels.quantize_half import GAUSSIAN_CLIP, quantize_half


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_papers_formula(bits: int, dtype: torch.dtype) -> None:
    """x_q = (round(clip(x, +-A rms) / step + 1/2) - 1/2) * step, away from ties and the clip."""
    x = torch.randn(4, 256).to(dtype)
    codes, step = quantize_half(x, bits)
    for row in range(len(x)):
        values = [float(v) for v in x[row]]
        rms = math.sqrt(sum(v * v for v in values) / len(values))
        s = 2 * GAUSSIAN_CLIP[bits] * rms / (2**bits - 1)
        assert step[row].item() == pytest.approx(s, rel=1e-6)
        top = 2**bits / 2 - 0.5
        for value, code in zip(values, codes[row].tolist()):
            expected = min(max(round(value / s + 0.5) - 0.5, -top), top)
            off_tie = abs(value / s - round(value / s)) > 1e-4
            assert code + 0.5 == expected or not off_tie


@pytest.mark.parametrize("bits", range(1, 9))
def test_clip_factors_minimize_the_error_of_a_gaussian(bits: int) -> None:
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)

    def error(factor: float) -> float:
        step = 2 * factor / (2**bits - 1)
        half = 2 ** (bits - 1)
        quantized = ((x / step).floor().clamp(-half, half - 1) + 0.5) * step
        return ((quantized - x).square() * density).sum().item()

    best = GAUSSIAN_CLIP[bits]
    # The paper clips at A, so the outermost values lie at +-A.
    assert error(best) < min(error(best * 0.98), error(best * 1.02))


@pytest.mark.usefixtures("backend")
def test_zeros_are_safe() -> None:
    codes, step = quantize_half(torch.zeros(2, 8), 4)
    assert ((codes.float() + 0.5) * step).tolist() == [[0.0] * 8] * 2


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(1, 128), (0, 128), (2, 3, 64), (3, 14336)])
def test_shapes(shape: tuple[int, ...]) -> None:
    codes, step = quantize_half(torch.randn(shape), 4)
    assert codes.shape == shape
    assert step.shape == (*shape[:-1], 1)
    assert codes.numel() == 0 or (codes.min() >= -8 and codes.max() <= 7)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.quantkit.quantize_half.default, (torch.randn(2, 3, 128), 4))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        quantize_half(torch.zeros(2, 8), 9)
