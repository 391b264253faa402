"""Block-diagonal Hadamard rotation of the last dimension."""

from __future__ import annotations

import torch

from .cpu import hadamard as native
from .dispatch import Op
from .hadamard_matrices import hadamard_matrix, split_order
from .quantize_fp8 import LARGEST_ROW, row_fits

# A larger power of two is applied as H_a (x) H_b with factors up to this size: two small matrix
# products instead of one large one.
LARGEST_FACTOR = 128


def _reference(x: torch.Tensor, block: int = 128, transpose: bool = False) -> torch.Tensor:
    """x [..., K] -> x @ blockdiag(H_block) / sqrt(block), in x's dtype, computed in float32.

    H is `hadamard_matrices.hadamard_matrix(block)`: of a known order (1, 12, 20, 28, ...) times a power
    of two. For a power of two it is symmetric (Sylvester), so that applying this twice is the
    identity; else `transpose` (H^T in its place) is the inverse. QuEST (arXiv 2502.05003), section 3,
    uses blocks of 128.

    Raises:
        ValueError: no Hadamard matrix of this order is known, or K is not a multiple of it.
    """
    order, power = split_order(block) or (1, 1)
    rows = _rotate(x.float().reshape(-1, power), power)
    if order > 1:
        matrix = hadamard_matrix(order, x.device)
        matrix = matrix.t() if transpose else matrix
        rows = (rows.view(-1, order, power).transpose(1, 2) @ matrix).transpose(1, 2)
    return (rows * block**-0.5).reshape(x.shape).to(x.dtype)


def _rotate(rows: torch.Tensor, block: int) -> torch.Tensor:
    inner = min(block, LARGEST_FACTOR)
    outer = block // inner
    if outer == 1:
        return rows @ hadamard_matrix(block, rows.device)
    split = _rotate(rows.reshape(-1, inner), inner).reshape(-1, outer, inner)
    across = _rotate(split.transpose(1, 2).reshape(-1, outer), outer)
    return across.reshape(-1, inner, outer).transpose(1, 2).reshape(rows.shape)


def _cpu(x: torch.Tensor, block: int = 128, transpose: bool = False) -> torch.Tensor:
    found = native.rotate(x, block)
    return _reference(x, block, transpose) if found is None else found


def _triton(x: torch.Tensor, block: int = 128, transpose: bool = False) -> torch.Tensor:
    from .gpu import hadamard as gpu

    return gpu.rotate(x, block, transpose)


def fits_gpu(x: torch.Tensor, block: int) -> bool:
    """Whether the Triton kernel takes this: powers of two, and half as large blocks of other orders."""
    order, power = split_order(block) or (1, 1)
    if order > 1 and power < LARGEST_FACTOR:
        return row_fits(x) and order <= LARGEST_FACTOR
    return row_fits(x) and block <= (LARGEST_ROW if order == 1 else LARGEST_ROW // 2)


def _supports(x: torch.Tensor, block: int = 128, transpose: bool = False) -> bool:
    return fits_gpu(x, block)


def check(x: torch.Tensor, block: int = 128, transpose: bool = False) -> None:
    if split_order(block) is None:
        raise ValueError(
            f"block must be a power of two, or one times 12, 20, 28 or another known order, got {block}"
        )
    if x.dim() == 0 or x.shape[-1] % block or not x.dtype.is_floating_point:
        raise ValueError(
            f"x must be floating point [..., K] with K a multiple of {block}, "
            f"got {x.dtype} {tuple(x.shape)}"
        )


def _fake(x: torch.Tensor, block: int = 128, transpose: bool = False) -> torch.Tensor:
    return x.new_empty(x.shape)


hadamard = Op(
    "hadamard",
    _reference,
    check=check,
    fake=_fake,
    cpu=_cpu,
    triton=_triton,
    triton_supports=_supports,
)
