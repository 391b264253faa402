"""Dynamic per-token symmetric integer quantization of activations."""

from __future__ import annotations

import torch

from .cpu import rows
from .dispatch import Op
from .quantize_fp8 import check as check_activation
from .quantize_fp8 import row_fits, safe_divisor


def largest_over_step(bits: int) -> float:
    """A row's largest magnitude in steps: 127 for 8 bits, as vLLM has it, 7.5 for 4, as compressed-tensors.

    With 7.5 a number is off by half a step at most, the largest too, and the step is a fifteenth smaller than with 7.
    compressed-tensors gives a largest number that is negative the code -8, as far from it as -7: it lies on the border, where
    its last bit would decide.
    """
    return 127.0 if bits == 8 else 2 ** (bits - 1) - 0.5


def _reference(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (int8 codes [..., K], float32 scale [..., 1]) with x ~ codes * scale.

    scale = max|row| / `largest_over_step(bits)` in float32, codes round half to even and stay within
    2^(bits-1) - 1 on both sides; a row of zeros gives zeros and scale 0. CrossQuant (arXiv 2410.07505),
    equation 1, the per-token baseline: what is left at run time once the column factor is folded into the weight.

    Raises:
        ValueError: bits is neither 4 nor 8, or x is not floating point [..., K].
    """
    x = x.float()
    top = 2 ** (bits - 1) - 1
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True)
    scale = largest / largest_over_step(bits)
    codes = (x / safe_divisor(scale)).round_().clamp_(-top, top)
    return codes.to(torch.int8), scale


def _cpu(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    top = 2 ** (bits - 1) - 1
    found = rows.quantize(x, rows.INTEGER, -top, top, largest_over_step(bits))
    return _reference(x, bits) if found is None else found


def _triton(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    from .gpu import rows as gpu

    return gpu.quantize(x, "int8", 2 ** (bits - 1) - 1, largest_over_step(bits))


def _check(x: torch.Tensor, bits: int = 8) -> None:
    check_activation(x)
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")


def _fake(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


quantize_int8 = Op(
    "quantize_int8",
    _reference,
    check=_check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=row_fits,
)
