"""GPTQ: rounding a weight column by column, each error made up for by the columns that follow.

Source: Frantar et al., arXiv 2210.17323, algorithm 1. With H = 2 X^T X, the inputs' Hessian, and U the upper
Cholesky factor of H^-1 (H^-1 = U^T U), column j is rounded and its error e_j = (w_j - q_j) / U_jj is taken
off every later column: w_k -= e_j U_jk. The scales are given and stay: this module only chooses the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.methods.rounding import Grid, quantize

_RETRIES = 3
# Rows or columns of a large matrix that are worked on together, where it is changed in place.
_CHUNK = 512
# Below this size a triangular matrix is inverted by substitution, above it by halves.
_LEAF = 512
# Rows worked on together on a CPU: a block of columns stays in the cache, and torch rounds so few numbers on
# one thread. Thousands of tiny parallel regions cost 10 ms each as soon as another process wants a core.
_ROWS = 2048


@dataclass(frozen=True)
class GptqResult:
    """What GPTQ found.

    Attributes:
        codes: int8 [N, K].
        target: float32 [N, K], the weight as it stood when each column was rounded, earlier columns' errors
            made up for: `codes` are its nearest levels.
        damping: the one used last.
        fell_back: whether plain rounding had to do instead.
    """

    codes: Tensor
    target: Tensor
    damping: float
    fell_back: bool


def accumulate_hessian(hessian: Tensor, x: Tensor) -> None:
    """Add 2 X^T X of the rows `x` [T, K] to `hessian` float32 [K, K], in place (it is an accumulator)."""
    x = x.to(hessian.dtype)
    hessian.addmm_(x.T, x, alpha=2.0)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> GptqResult:
    """Round `weight` to the levels of `scale`, with the least output error GPTQ can reach.

    Args:
        weight: [N, K].
        hessian: [K, K], 2 X^T X up to a factor. Inputs that were always zero (zero diagonal) are rounded
            plainly and compensate nothing.
        scale: [N, G], fixed; group i holds columns i * K / G to (i + 1) * K / G, in whatever order they are
            visited.
        grid: the levels.
        damping: share of the mean diagonal added to the diagonal; where the Cholesky fails, ten times as
            much, at most three times.
        block: columns whose updates of later columns are applied together.
        act_order: visit the columns with the largest diagonal first.

    Returns:
        The codes. A Hessian that cannot be used (NaN, infinity, indefinite beyond damping) is no error:
        the codes are then plain rounding's and `fell_back` is true.

    Raises:
        ValueError: shapes do not fit, or `damping` or `block` is not positive.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"the Hessian of {columns} inputs cannot have shape {list(hessian.shape)}")
    if scale.shape[0] != weight.shape[0] or columns % scale.shape[1]:
        raise ValueError(f"scales {list(scale.shape)} do not fit a weight {list(weight.shape)}")
    if not damping > 0 or block < 1:
        raise ValueError(f"damping and block must be positive, not {damping} and {block}")

    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor, damping = _inverse_factor(hessian, order, damping)
    if factor is None:
        return GptqResult(quantize(weight, scale, grid), weight.float(), damping, True)
    # Transposed: a column of the weight is then contiguous, and updates run along memory.
    work = weight.float().T[order]
    groups = order // (columns // scale.shape[1])
    # Rows do not depend on each other. On a GPU splitting them would only add launches.
    rows = _ROWS if weight.device.type == "cpu" else max(weight.shape[0], 1)
    parts = [part.contiguous() for part in work.split(rows, 1)]
    visited = [
        _compensate(part, factor, level.T.contiguous(), groups.tolist(), grid, block)
        for part, level in zip(parts, scale.float().split(rows))
    ]
    codes, target = torch.empty_like(work, dtype=torch.int8), work
    codes[order], target[order] = torch.cat(visited, 1), torch.cat(parts, 1)
    return GptqResult(codes.T.contiguous(), target.T.contiguous(), damping, False)


def _compensate(
    work: Tensor, factor: Tensor, scale: Tensor, groups: list[int], grid: Grid, block: int
) -> Tensor:
    """The loop of GPTQ on `work` [K, N] (becomes what was rounded), `factor` = U [K, K] and `scale` [G, N]: codes [K, N]."""
    columns = work.shape[0]
    codes = torch.empty_like(work, dtype=torch.int8)
    diagonal = factor.diagonal().tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(work[start:stop])
        for j in range(start, stop):
            level = scale[groups[j]]
            codes[j] = grid.encode(work[j], level)
            error = (work[j] - grid.decode(codes[j], level)) / diagonal[j]
            # addmm of one column, not addr: the BLAS knows when threads do not pay, addr always takes them.
            later = work[j + 1 : stop]
            later.addmm_(factor[j, j + 1 : stop, None], error[None], alpha=-1.0)
            errors[j - start] = error
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1.0)
    return codes


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor | None, float]:
    """U float32 [K, K], upper, with U^T U the inverse of the damped, reordered Hessian; None where it fails.

    With J the reversal of rows and columns, J H J = L L^T gives H = R R^T for the upper R = J L J, and so
    H^-1 = U^T U for U = R^-1: one Cholesky and one triangular inverse, without forming H^-1.
    """
    diagonal = hessian.diagonal().double()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    if not _finite(hessian) or not mean > 0:
        return None, damping
    # U's scale cancels in the updates, so the mean diagonal may be 1: nothing over- or underflows.
    kept = hessian.diagonal()[order] != 0
    order, alive = order.flip(0), kept.flip(0)
    for attempt in range(_RETRIES + 1):
        damping = damping * 10 if attempt else damping
        # Factored, inverted and narrowed where it lies: of 28,672 inputs it has 6.6 GB. Made anew where that fails.
        matrix = _reordered(hessian, order, alive, mean)
        matrix.diagonal().add_(damping)
        transposed = matrix.mT  # LAPACK's order: no copy is made for it
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(transposed, upper=True, out=(transposed, info))
        if int(info) == 0:
            _invert_lower(matrix)
            upper = _flipped_float(matrix)
            if _finite(upper):
                return upper, damping
    return None, damping


def _finite(matrix: Tensor) -> bool:
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(_CHUNK))


def _reordered(hessian: Tensor, order: Tensor, alive: Tensor, mean: float) -> Tensor:
    """Rows and columns `order` of `hessian` over `mean`, float64; the identity where an input is not alive."""
    columns = hessian.shape[0]
    matrix = torch.empty(columns, columns, dtype=torch.float64, device=hessian.device)
    for first in range(0, columns, _CHUNK):
        rows = slice(first, first + _CHUNK)
        matrix[rows] = hessian[order[rows]][:, order].double().div_(mean)
    matrix[~alive] = 0
    matrix[:, ~alive] = 0
    matrix.diagonal()[~alive] = 1
    return matrix


def _invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place; by halves, so that most of the work is a matrix product."""
    size = lower.shape[0]
    if size <= _LEAF:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(first)
    _invert_lower(last)
    for columns in below.split(_CHUNK, 1):
        columns.copy_(last @ columns)
    for rows in below.split(_CHUNK):
        rows.copy_(rows @ first).neg_()


def _flipped_float(matrix: Tensor) -> Tensor:
    """`matrix` [K, K] float64 with rows and columns reversed, float32 in the first half of the same memory."""
    size = matrix.shape[0]
    for first in range(0, size // 2, _CHUNK):
        last = min(first + _CHUNK, size // 2)
        head, tail = matrix[first:last], matrix[size - last : size - first]
        kept = head.flip(0, 1)
        head.copy_(tail.flip(0, 1))
        tail.copy_(kept)
    if size % 2:
        middle = matrix[size // 2]
        middle.copy_(middle.flip(0))
    narrow = matrix.view(-1).view(torch.float32)[: size * size].view(size, size)
    # Row r of the result covers rows up to r / 2, which are read by then: each piece is read before it is written.
    for first in range(0, size, _CHUNK):
        narrow[first : first + _CHUNK] = matrix[first : first + _CHUNK].float()
    return narrow
