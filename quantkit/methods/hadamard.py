"""Rotations by blocks of a Hadamard matrix: an outlier is spread over its whole block.

Source: QuEST, arXiv 2502.05003, and QuaRot, arXiv 2404.00456. With R = blockdiag(H, ..., H) / sqrt(block),
R^T R = I, so (x R) (w R)^T = x w^T: rotating activation and weight alike leaves a linear's output as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.kernels.hadamard_matrices import hadamard_matrix, split_order

# Larger powers of two are rotated as a Kronecker product with this one, far cheaper than one large product.
_FACTOR = 128
# The part of a block that is no power of two is a dense matrix: wider ones cost more than they give.
_WIDEST_ORDER = 512
# Rows or columns of a Hessian that are rotated together.
_STRIP = 1024


def known_block(block: int) -> bool:
    """Whether blocks of this size can be rotated: a power of two, or one times 12, 20, 28 or another known order."""
    found = split_order(block)
    return found is not None and found[0] <= _WIDEST_ORDER


def widest_block(columns: int) -> int:
    """The largest known block that divides `columns`: all of 4096, 3584 or 14336, but 256 of 11008."""
    return max(b for b in range(1, columns + 1) if columns % b == 0 and known_block(b))


def random_signs(columns: int, seed: int) -> Tensor:
    """float32 [columns] of +-1: a rotation behind them spreads a mean that all channels share, too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (columns,), generator=generator).float() * 2 - 1


def rotate(x: Tensor, block: int, *, inverse: bool = False) -> Tensor:
    """x R: `x` [..., K] with each `block` of consecutive inputs multiplied by H / sqrt(block).

    Args:
        block: a known order (`known_block`) that divides K.
        inverse: multiply by R^T instead. For a power of two H is symmetric and both are the same.

    Returns:
        float32, or float64 for float64 input.

    Raises:
        ValueError: no Hadamard matrix of order `block` is known, or it does not divide K.
    """
    columns = x.shape[-1]
    if block < 1 or columns % block:
        raise ValueError(f"{columns} inputs do not divide into rotation blocks of {block}")
    if not known_block(block):
        raise ValueError(f"no Hadamard matrix of order {block} is known here")
    x = x if x.dtype == torch.float64 else x.float()
    order, power = split_order(block) or (1, 1)
    # H_block = H_order (x) H_outer (x) H_inner, the last two Sylvester's.
    inner = math.gcd(power, _FACTOR)
    outer = power // inner
    parts = x.reshape(-1, outer, inner) @ _matrix(inner, x)
    if outer > 1:
        parts = _matrix(outer, x) @ parts
    if order > 1:
        matrix = _matrix(order, x)
        parts = (matrix if inverse else matrix.T) @ parts.reshape(-1, order, power)
    return (parts / math.sqrt(block)).reshape(x.shape)


def rotate_hessian(hessian: Tensor, block: int) -> Tensor:
    """R^T H R: the Hessian [K, K] of rotated inputs x R.

    Raises:
        ValueError: as `rotate`.
    """
    double = hessian.dtype == torch.float64
    turned = torch.empty_like(hessian, dtype=torch.float64 if double else torch.float32)
    # In strips: of 28,672 inputs a Hessian has 3.3 GB, and one more of them is enough.
    strips = [slice(n, n + _STRIP) for n in range(0, hessian.shape[0], _STRIP)]
    for strip in strips:
        turned[strip] = rotate(hessian[strip], block)
    for strip in strips:
        turned[:, strip] = rotate(turned[:, strip].T, block).T
    return turned


def _matrix(n: int, like: Tensor) -> Tensor:
    return hadamard_matrix(n, like.device).to(like.dtype)
