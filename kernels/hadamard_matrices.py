"""Hadamard matrices: +-1, rows orthogonal, in the orders that models' widths need.

Powers of two by Sylvester's doubling; q + 1 (q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4) by Paley's two
constructions over the field of q elements, q a prime or the square of one (R. E. A. C. Paley, On Orthogonal
Matrices, 1933); and every such order times a power of two, by the Kronecker product.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import torch


def split_order(n: int) -> tuple[int, int] | None:
    """n = order * 2^k with the smallest order that is known (1 for powers of two), or None."""
    if n < 1:
        return None
    order, power = n, 1
    while order % 2 == 0:
        order //= 2
        power *= 2
    if order == 1:
        return 1, power
    while power >= 4:
        # An order above 2 is a multiple of 4.
        base = order * 4
        while n % base == 0:
            if _paley_field(base) is not None:
                return base, n // base
            base *= 2
        return None
    return None


@lru_cache(maxsize=32)
def hadamard_matrix(n: int, device: torch.device) -> torch.Tensor:
    """H [n, n] of +-1 in float32, H H^T = n I; symmetric where n is a power of two.

    Raises:
        ValueError: no construction for n is known here.
    """
    found = split_order(n)
    if found is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    order, power = found
    matrix = torch.ones(1, 1) if order == 1 else _paley(order)
    doubled = torch.ones(1, 1)
    while len(doubled) < power:
        doubled = torch.cat((torch.cat((doubled, doubled), 1), torch.cat((doubled, -doubled), 1)))
    return torch.kron(matrix, doubled).to(device)


def _paley_field(order: int) -> tuple[int, bool] | None:
    """(q, first construction) for Paley's matrix of this order, or None."""
    if (order - 1) % 4 == 3 and _is_field(order - 1):
        return order - 1, True
    if order % 2 == 0 and (order // 2 - 1) % 4 == 1 and _is_field(order // 2 - 1):
        return order // 2 - 1, False
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, isqrt(q) + 1))


def _is_field(q: int) -> bool:
    return _is_prime(q) or (isqrt(q) ** 2 == q and _is_prime(isqrt(q)))


def _paley(order: int) -> torch.Tensor:
    found = _paley_field(order)
    assert found is not None
    q, first = found
    jacobsthal = _jacobsthal(q)
    border = torch.ones(q)
    core = torch.zeros(q + 1, q + 1)
    core[0, 1:] = border
    core[1:, 1:] = jacobsthal
    if first:
        core[1:, 0] = -border
        return core + torch.eye(q + 1)
    core[1:, 0] = border
    on = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, on) + torch.kron(torch.eye(q + 1), off)


def _jacobsthal(q: int) -> torch.Tensor:
    """[q, q] of the quadratic character of a - b over the field of q elements."""
    p = q if _is_prime(q) else isqrt(q)
    if p == q:
        elements = [(a, 0) for a in range(q)]
        root = 0
    else:
        # The field is Z_p with the square root of a number that has none there.
        squares = {a * a % p for a in range(p)}
        root = next(a for a in range(2, p) if a not in squares)
        elements = [(a, b) for a in range(p) for b in range(p)]
    residues = {
        ((a * a + root * b * b) % p, 2 * a * b % p) for a, b in elements if (a, b) != (0, 0)
    }
    character = {
        element: 0 if element == (0, 0) else 1 if element in residues else -1
        for element in elements
    }
    rows = [[character[(a - c) % p, (b - d) % p] for c, d in elements] for a, b in elements]
    return torch.tensor(rows, dtype=torch.float32)
