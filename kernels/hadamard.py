"""Block-diagonal Hadamard rotation of the last dimension."""

from __future__ import annotations

from functools import lru_cache

import torch

from .dispatch import Op

# A larger block is applied as H_a (x) H_b with factors up to this size: two small matrix products
# instead of one large one.
_LARGEST_FACTOR = 128


@lru_cache(maxsize=32)
def sylvester(n: int, device: torch.device) -> torch.Tensor:
    """The n x n Hadamard matrix of +-1 in Sylvester order, float32; n a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _reference(x: torch.Tensor, block: int = 128) -> torch.Tensor:
    """x [..., K] -> x @ blockdiag(H_block) / sqrt(block), in x's dtype, computed in float32.

    H is symmetric in Sylvester order, so applying this twice is the identity. QuEST
    (arXiv 2502.05003), section 3, uses blocks of 128.

    Raises:
        ValueError: block is not a power of two, or K is not a multiple of it.
    """
    rotated = _rotate(x.float().reshape(-1, block), block)
    return (rotated * block**-0.5).to(x.dtype).reshape(x.shape)


def _rotate(rows: torch.Tensor, block: int) -> torch.Tensor:
    inner = min(block, _LARGEST_FACTOR)
    outer = block // inner
    if outer == 1:
        return rows @ sylvester(block, rows.device)
    split = _rotate(rows.reshape(-1, inner), inner).reshape(-1, outer, inner)
    across = _rotate(split.transpose(1, 2).reshape(-1, outer), outer)
    return across.reshape(-1, inner, outer).transpose(1, 2).reshape(rows.shape)


def check(x: torch.Tensor, block: int = 128) -> None:
    if block < 1 or block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")
    if x.dim() == 0 or x.shape[-1] % block or not x.dtype.is_floating_point:
        raise ValueError(
            f"x must be floating point [..., K] with K a multiple of {block}, "
            f"got {x.dtype} {tuple(x.shape)}"
        )


def _fake(x: torch.Tensor, block: int = 128) -> torch.Tensor:
    return x.new_empty(x.shape)


hadamard = Op("hadamard", _reference, check=check, fake=_fake, cpu=_reference)
