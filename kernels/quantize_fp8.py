"""Dynamic per-token FP8 (e4m3) quantization of activations."""

from __future__ import annotations

import torch

from .cpu import rows
from .dispatch import Op

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
LARGEST_ROW = 32768  # that a Triton program holds at once


def safe_divisor(scale: torch.Tensor) -> torch.Tensor:
    """`scale`, of either sign, with its zeros replaced by 1: rows of zeros quantize to zeros, not to NaN."""
    return torch.where(scale.abs() > 0, scale, torch.ones_like(scale))


def _reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (e4m3 [..., K], float32 scale [..., 1]) with x ~ values * scale.

    scale = max|row| / 448 in float32; values round to nearest even and saturate; a row of zeros
    gives zeros and scale 0. FireQ (arXiv 2505.20839), activations of linear layers.

    Raises:
        ValueError: x has no dimension, or is not floating point.
    """
    x = x.float()
    scale = _absmax(x) / E4M3_MAX
    values = (x / safe_divisor(scale)).clamp_(-E4M3_MAX, E4M3_MAX)
    return values.to(E4M3), scale


def _cpu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = rows.quantize(x, rows.FLOAT8, -E4M3_MAX, E4M3_MAX, E4M3_MAX)
    return _reference(x) if found is None else found


def _triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from .gpu import rows as gpu

    return gpu.quantize(x, "fp8", E4M3_MAX, E4M3_MAX)


def _absmax(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True)


def row_fits(x: torch.Tensor, *args: object, **kwargs: object) -> bool:
    """Whether the Triton kernels take rows as these."""
    return x.shape[-1] > 0 and x.dtype != torch.float64


def check(x: torch.Tensor) -> None:
    if x.dim() == 0 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point [..., K], got {x.dtype} {tuple(x.shape)}")


def _fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape, dtype=E4M3),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


quantize_fp8 = Op(
    "quantize_fp8",
    _reference,
    check=check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=row_fits,
)
