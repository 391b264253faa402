"""Rotations by blocks of a Hadamard matrix: an outlier is spread over its whole block.

Source: QuEST, arXiv 2502.05003, and QuaRot, arXiv 2404.00456. With R = blockdiag(H, ..., H) / sqrt(block),
R^T R = I, so (x R) (w R)^T = x w^T: rotating activation and weight alike leaves a linear's output as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Larger blocks are rotated as a Kronecker product with this one, far cheaper than one large product.
_FACTOR = 128


def hadamard_matrix(n: int) -> Tensor:
    """Sylvester's Hadamard matrix [n, n], float64, entries +-1, symmetric.

    Raises:
        ValueError: `n` is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Hadamard matrix of size {n} is not known here: use a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def rotate(x: Tensor, block: int) -> Tensor:
    """x R: `x` [..., K] with each `block` of consecutive inputs multiplied by H / sqrt(block).

    Returns:
        float32, or float64 for float64 input.

    Raises:
        ValueError: `block` is not a power of two or does not divide K.
    """
    columns = x.shape[-1]
    if block < 1 or columns % block:
        raise ValueError(f"{columns} inputs do not divide into rotation blocks of {block}")
    x = x if x.dtype == torch.float64 else x.float()
    # Sylvester's matrices are Kronecker powers: H_block = H_outer (x) H_inner.
    inner = math.gcd(block, _FACTOR)
    outer = block // inner
    parts = x.reshape(-1, outer, inner) @ hadamard_matrix(inner).to(x)
    if outer > 1:
        parts = hadamard_matrix(outer).to(x) @ parts
    return (parts / math.sqrt(block)).reshape(x.shape)


def rotate_hessian(hessian: Tensor, block: int) -> Tensor:
    """R^T H R: the Hessian [K, K] of rotated inputs x R.

    Raises:
        ValueError: as `rotate`.
    """
    return rotate(rotate(hessian, block).T, block).T.contiguous()
