"""GPTQ: rounding a weight column by column, each error made up for by the columns that follow.

Source: Frantar et al., arXiv 2210.17323. Its algorithm 1 takes the Cholesky factor of the inverse of H = 2 X^T X. The
same codes come from the factor of H itself, with one factorization, no inverse, and the loss for nothing: with the columns
in the order of their visits, H = M D M^T for a unit upper M and a diagonal D makes the loss of a row's errors
e = w - q

    e H e^T = sum_j D_j (e_j + sum_(i<j) e_i M_ij)^2,

so that column j is best rounded from t_j = w_j + sum_(i<j) e_i M_ij, and then loses D_j (t_j - q_j)^2. That the two are
one is shown by Chen et al., arXiv 2507.18553 (GPTQ is Babai's nearest plane), section 4. The scales are given and stay:
this module only chooses the codes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.finite import all_finite
from quantkit.kernels.cpu import hessian as native_hessian
from quantkit.kernels.cpu import rounding as native
from quantkit.methods.rounding import Grid

_RETRIES = 3
# Rows or columns of a large matrix that are worked on together, where it is changed in place.
_CHUNK = 512
# Rows of a Hessian that are accumulated together, from the diagonal to the right: it is symmetric.
_STRIP = 256
# Rows worked on together on a CPU: a block of columns stays in the cache, and torch rounds so few numbers on
# one thread. Thousands of tiny parallel regions cost 10 ms each as soon as another process wants a core.
_ROWS = 2048


@dataclass(frozen=True)
class HessianFactor:
    """A damped Hessian made ready, for all weights that read its inputs; from `factorize`.

    Attributes:
        order: int64 [K], the columns as they are visited; None where that is as they lie.
        ratios: float32 [K, K], M in that order: upper triangular, 1 on the diagonal.
        pivots: float64 [K], D in that order, in units of `mean`.
        mean: the mean of the Hessian's diagonal.
        damping: its share that was added to the diagonal in the end.
        dead: bool [K], in that order: inputs that were always zero.
    """

    order: Tensor | None
    ratios: Tensor
    pivots: Tensor
    mean: float
    damping: float
    dead: Tensor


@dataclass(frozen=True)
class GptqResult:
    """What GPTQ found.

    Attributes:
        codes: int8 [N, K].
        visited: float32 [K, n] each for some rows of the weight, as they stood when each column was rounded, in the order
            of visits.
        order: as `HessianFactor`'s.
        loss: tr(E H E^T) of the errors E, without damping.
    """

    codes: Tensor
    visited: list[Tensor]
    order: Tensor | None
    loss: float

    @property
    def target(self) -> Tensor:
        """The weight float32 [N, K] with earlier columns' errors made up for: `codes` are its nearest levels."""
        return _rows_of(self.visited, self.order)


def accumulate_hessian(hessian: Tensor, x: Tensor, *, rounded: bool = False) -> None:
    """Add 2 X^T X of the rows `x` [T, K] to `hessian` float32 [K, K], in place (it is an accumulator).

    What lies left of the blocks on the diagonal means nothing until `complete_hessian` fills it.

    Args:
        rounded: `x` may be rounded to bfloat16 where that is faster.
    """
    x = x.to(hessian.dtype)
    if rounded and native_hessian.accumulate(hessian, x, _STRIP):
        return
    with native_hessian.rounded_factors() if rounded else nullcontext():
        for first in range(0, x.shape[1], _STRIP):
            strip = slice(first, first + _STRIP)
            hessian[strip, first:].addmm_(x[:, strip].T, x[:, first:], alpha=2.0)


def complete_hessian(hessian: Tensor) -> None:
    """Mirror the accumulated upper half of `hessian` [K, K] into its lower half, in place."""
    for first in range(0, hessian.shape[0], _STRIP):
        rest = first + _STRIP
        hessian[rest:, first:rest] = hessian[first:rest, rest:].T


def factorize(
    hessian: Tensor, *, damping: float = 0.01, act_order: bool = False
) -> HessianFactor | None:
    """Make a Hessian ready for `gptq`.

    Args:
        hessian: [K, K], 2 X^T X up to a factor. Inputs that were always zero (zero diagonal) are rounded
            plainly and compensate nothing.
        damping: share of the mean diagonal added to the diagonal; where the Cholesky fails, ten times as
            much, at most three times.
        act_order: visit the columns with the largest diagonal first.

    Returns:
        None for a Hessian that cannot be used (NaN, infinity, indefinite beyond damping): round plainly then.

    Raises:
        ValueError: `damping` is not positive.
    """
    if not damping > 0:
        raise ValueError(f"damping must be positive, not {damping}")
    diagonal = hessian.diagonal().double()
    alive = diagonal != 0
    mean = float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    if not all_finite(hessian) or not mean > 0:
        return None
    order = diagonal.float().argsort(descending=True, stable=True) if act_order else None
    alive = alive if order is None else alive[order]
    for attempt in range(_RETRIES + 1):
        damping = damping * 10 if attempt else damping
        # In float32, as the sums are: no eigenvalue is above K times the mean, so damping by a hundredth of it keeps the
        # condition below 100 K. Factored where it lies: of 28,672 inputs it has 3.3 GB. Made anew where that fails.
        matrix = _reversed(hessian, order, alive, mean)
        matrix.diagonal().add_(damping)
        transposed = matrix.mT  # LAPACK's order: no copy is made for it
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(transposed, upper=True, out=(transposed, info))
        if int(info) == 0:
            pivots = matrix.diagonal().double().flip(0).square()
            dead = ~alive
            pivots[dead] = 1 + damping  # without the rounding of a root
            ratios = _ratios(matrix)
            if all_finite(ratios):
                return HessianFactor(order, ratios, pivots, mean, damping, dead)
    return None


def gptq(
    weight: Tensor, factor: HessianFactor, scale: Tensor, grid: Grid, *, block: int = 128
) -> GptqResult:
    """Round `weight` to the levels of `scale`, with the least output error GPTQ can reach.

    Args:
        weight: [N, K].
        factor: of its inputs' Hessian.
        scale: [N, G], fixed; group i holds columns i * K / G to (i + 1) * K / G, in whatever order they are
            visited.
        grid: the levels.
        block: columns whose updates of later columns are applied together.

    Raises:
        ValueError: shapes do not fit, or `block` is not positive.
    """
    columns, order = weight.shape[1], factor.order
    if factor.dead.numel() != columns:
        raise ValueError(f"the Hessian of {columns} inputs cannot be one of {factor.dead.numel()}")
    if scale.shape[0] != weight.shape[0] or columns % scale.shape[1]:
        raise ValueError(f"scales {list(scale.shape)} do not fit a weight {list(weight.shape)}")
    if block < 1:
        raise ValueError(f"block must be positive, not {block}")

    places = torch.arange(columns, device=weight.device) if order is None else order
    groups = (places // (columns // scale.shape[1])).int()
    # Rows do not depend on each other. On a GPU splitting them would only add launches.
    rows = _ROWS if weight.device.type == "cpu" else max(weight.shape[0], 1)
    parts = [
        _compensate(part.float(), factor, level.T.contiguous(), groups, grid, block)
        for part, level in zip(weight.split(rows), scale.float().split(rows))
    ]
    codes = _rows_of([codes for codes, _, _ in parts], order)
    return GptqResult(codes, [v for _, v, _ in parts], order, sum(loss for *_, loss in parts))


def _compensate(
    weight: Tensor, factor: HessianFactor, scale: Tensor, groups: Tensor, grid: Grid, block: int
) -> tuple[Tensor, Tensor, float]:
    """The loop of GPTQ on a weight float32 [N, K] with `scale` [G, N]: in the order of visits, codes [K, N] and the weight
    as it stood [K, N]; their loss."""
    columns = weight.shape[1]
    # Transposed: a column of the weight is then contiguous, and updates run along memory.
    work = _columns(weight, factor.order, slice(0, columns))
    codes = torch.empty_like(work, dtype=torch.int8)
    loss: float | Tensor = 0.0
    for start in range(0, columns, block):
        here = slice(start, min(start + block, columns))
        part = _Block(
            work[here],
            _columns(weight, factor.order, here),
            factor.ratios[here, here],
            scale,
            groups[here],
            factor.pivots[here],
            factor.damping + factor.dead[here].double(),
        )
        errors, lost = part.round(codes[here], grid)
        loss = loss + lost
        work[here.stop :].addmm_(factor.ratios[here, here.stop :].T, errors)
    return codes, work, max(float(loss), 0.0) * factor.mean


@dataclass(frozen=True)
class _Block:
    """B columns of a weight, rounded before any later one is looked at.

    Attributes:
        work: float32 [B, N], the weights as they stand; they become the targets.
        original: float32 [B, N], the weights as they were.
        ratios: float32 [B, B].
        scale: float32 [G, N].
        groups: int32 [B], each column's row of `scale`.
        pivots, added: float64 [B], what a target's and a weight's squared error add to and take off the loss.
    """

    work: Tensor
    original: Tensor
    ratios: Tensor
    scale: Tensor
    groups: Tensor
    pivots: Tensor
    added: Tensor

    def round(self, codes: Tensor, grid: Grid) -> tuple[Tensor, float | Tensor]:
        """Fill `codes` int8 [B, N]; gives the errors float32 [B, N] and the loss."""
        found = native.gptq_block(
            *(
                self.work,
                self.original,
                self.ratios,
                self.scale,
                self.groups,
                self.pivots,
                self.added,
            ),
            *(codes, *grid.codes, grid.shift),
        )
        if found is not None:
            return found
        errors, levels = torch.empty_like(self.work), torch.empty_like(self.work)
        for j, row in enumerate(self.groups.tolist()):
            levels[j] = grid.nearest(self.work[j], self.scale[row])
            errors[j] = self.original[j] - grid.value(levels[j], self.scale[row])
            # addmm of one column, not addr: the BLAS knows when threads do not pay, addr always takes them.
            self.work[j + 1 :].addmm_(self.ratios[j, j + 1 :, None], errors[j, None])
        codes.copy_(levels)
        missed = self.work - (self.original - errors)
        # An error is that of the weight as it was, what is missed that of its target.
        loss = self.pivots * missed.square().sum(1) - self.added * errors.square().sum(1)
        return errors, loss.sum()


def _columns(weight: Tensor, order: Tensor | None, here: slice) -> Tensor:
    """A copy [B, N] of the columns of a weight [N, K] that are visited from here to there."""
    columns = weight[:, here] if order is None else weight[:, order[here]]
    return columns.T.clone(memory_format=torch.contiguous_format)


def _rows_of(visited: list[Tensor], order: Tensor | None) -> Tensor:
    """A matrix [N, K] of parts [K, n] whose columns lie in the order of their visits."""
    back = None if order is None else order.argsort()
    return torch.cat([(part if back is None else part[back]).T for part in visited])


def _reversed(hessian: Tensor, order: Tensor | None, alive: Tensor, mean: float) -> Tensor:
    """Rows and columns of `hessian` over `mean`, the last to be visited first; the identity where an input is not alive.

    A Cholesky factor is lower, M is upper: it is that of the matrix in reverse.
    """
    alive = alive.flip(0)
    if order is None:
        matrix = hessian.float().flip(0, 1).div_(mean)
    else:
        order = order.flip(0)
        matrix = torch.empty_like(hessian, dtype=torch.float32)
        for first in range(0, hessian.shape[0], _CHUNK):
            rows = slice(first, first + _CHUNK)
            matrix[rows] = hessian[order[rows]][:, order].div_(mean)
    if not bool(alive.all()):
        matrix[~alive] = 0
        matrix[:, ~alive] = 0
        matrix.diagonal()[~alive] = 1
    return matrix


def _ratios(matrix: Tensor) -> Tensor:
    """M float32 [K, K] from the Cholesky factor [K, K] of the reversed matrix, where that lies."""
    size = matrix.shape[0]
    matrix.div_(matrix.diagonal().clone())
    for first in range(0, size // 2, _CHUNK):
        last = min(first + _CHUNK, size // 2)
        head, tail = matrix[first:last], matrix[size - last : size - first]
        kept = head.flip(0, 1)
        head.copy_(tail.flip(0, 1))
        tail.copy_(kept)
    if size % 2:
        middle = matrix[size // 2]
        middle.copy_(middle.flip(0))
    return matrix
