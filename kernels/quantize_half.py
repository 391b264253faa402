"""QuEST's quantizer: Gaussian MSE-optimal clipping on a half-integer grid without zero."""

from __future__ import annotations

import torch

from .cpu import rows
from .dispatch import Op
from .quantize_fp8 import check as check_activation
from .quantize_fp8 import row_fits, safe_divisor

# A_b: the clipping factor, in units of the rms, that minimizes the mean squared error of a
# Gaussian on the b-bit half-integer grid.
GAUSSIAN_CLIP = {
    1: 0.79788,
    2: 1.49353,
    3: 2.05107,
    4: 2.51393,
    5: 2.91609,
    6: 3.27660,
    7: 3.60105,
    8: 3.88494,
}


def _reference(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (int8 codes n [..., K], float32 step [..., 1]), x ~ (n + 1/2) * step.

    step = 2 * A_b * rms(row) / (2^bits - 1), n = floor(x / step) clamped to
    [-2^(bits-1), 2^(bits-1) - 1]; a row of zeros gives step 0. QuEST (arXiv 2502.05003),
    section 3, the forward quantizer.

    Raises:
        ValueError: bits is not in 1..8, or x is not floating point [..., K].
    """
    x = x.float()
    rms = x.square().mean(dim=-1, keepdim=True).sqrt_()
    step = rms * step_factor(bits)
    half = 2 ** (bits - 1)
    codes = (x / safe_divisor(step)).floor_().clamp_(-half, half - 1)
    return codes.to(torch.int8), step


def step_factor(bits: int) -> float:
    """step / rms of the grid."""
    return 2 * GAUSSIAN_CLIP[bits] / (2**bits - 1)


def _cpu(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    half = 2 ** (bits - 1)
    found = rows.quantize(x, rows.HALF_INTEGER, -half, half - 1, step_factor(bits))
    return _reference(x, bits) if found is None else found


def _triton(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    from .gpu import rows as gpu

    return gpu.quantize(x, "half", 2 ** (bits - 1), step_factor(bits))


def _check(x: torch.Tensor, bits: int) -> None:
    check_activation(x)
    if bits not in GAUSSIAN_CLIP:
        raise ValueError(f"bits must be 1 to 8, got {bits}")


def _fake(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


quantize_half = Op(
    "quantize_half",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=row_fits,
)
