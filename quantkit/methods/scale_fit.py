"""The best scales for given codes: least squares under the inputs' Hessian, over what can be stored.

With levels L [N, K], scales s [N, G] and H = 2 X^T X, a row's output error is (w - s L) H (w - s L)^T, where s L is
each group's levels times its scale. That is a parabola in s: s A s^T - 2 b s^T + c, with A_gh = L_g H_gh L_h^T and
b_g = L_g (H w)_g. Storage makes it discrete: bf16 numbers, or FP8 codes times one channel scale, whose steps are an
eighth. So scales are fitted among those that `store` gives, one group after the other, each at the best for the others
as they stand; a row moves only where its error falls.

Source: alternating codes and scales is as old as LSQ and k-means; the closed form per group is GPTQ's quadratic
(arXiv 2210.17323, equation 1) in the scale. That it is searched over FP8 codes and channel scales jointly is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantkit.methods.rounding import Grid

# Of the largest scale of a row. FP8 codes are 1/8 to 1/16 apart: within that range every row of codes comes round.
FP8_STRETCHES = tuple(1 + step / 64 for step in range(-6, 7))
# Numbers of a chunk of rows' intermediate [rows, K] products.
_CHUNK = 1 << 22


@torch.no_grad()
def fit_scales(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    hessian: Tensor,
    grid: Grid,
    store: Callable[[Tensor], Tensor],
    *,
    sweeps: int = 2,
    stretches: Sequence[float] = (1.0,),
) -> Tensor:
    """Stored scales float32 [N, G] with no more output error than `scale` for the same codes, row by row.

    Args:
        weight: [N, K].
        codes: int8 [N, K]; they stay.
        scale: [N, G], as stored now.
        hessian: [K, K], of the linear's inputs.
        grid: the levels.
        store: positive scales [n, G] of some rows -> what a file holds of them, float32; storing twice changes nothing.
        sweeps: passes over the groups.
        stretches: factors on a row's largest scale, each tried as a start: where `store` normalises by the
            row's largest, they move all other levels (`FP8_STRETCHES`).

    Raises:
        ValueError: shapes do not fit.
    """
    rows, columns = weight.shape
    groups = scale.shape[1]
    if codes.shape != weight.shape or scale.shape[0] != rows or columns % groups:
        raise ValueError(f"{list(scale.shape)} scales do not fit a weight {list(weight.shape)}")
    if hessian.shape != (columns, columns):
        raise ValueError(f"the Hessian of {columns} inputs cannot have shape {list(hessian.shape)}")
    # Its size cancels; a mean diagonal of 1 keeps sums of squares within float32.
    hessian = hessian.float() / hessian.diagonal().float().mean().clamp_min(1e-30)
    found = []
    for part in torch.arange(rows, device=weight.device).split(max(1, _CHUNK // columns)):
        levels = grid.decode(codes[part], torch.ones((), device=weight.device))
        equations = _normal_equations(weight[part].float(), levels, hessian, groups)
        found.append(_fit(*equations, scale[part].float(), store, sweeps, stretches))
    return torch.cat(found)


def _normal_equations(
    weight: Tensor, levels: Tensor, hessian: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """A [N, G, G] and b [N, G] in float64: sums of products that nearly cancel."""
    size = weight.shape[1] // groups
    split = levels.unflatten(1, (groups, size))
    b = ((weight @ hessian).unflatten(1, (groups, size)) * split).sum(-1, dtype=torch.float64)
    rows = []
    for g in range(groups):
        seen = split[:, g] @ hessian[g * size : (g + 1) * size]
        rows.append((seen.unflatten(1, (groups, size)) * split).sum(-1, dtype=torch.float64))
    return torch.stack(rows, 1), b


def _fit(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    store: Callable[[Tensor], Tensor],
    sweeps: int,
    stretches: Sequence[float],
) -> Tensor:
    best, least = scale, _error(a, b, scale)
    for stretch in stretches:
        start = scale
        if stretch != 1:
            top = scale == scale.amax(1, keepdim=True)
            start = torch.where(top, scale * stretch, scale)
            # The others follow freely before they are stored: else they would be rounded twice.
            for g in range(scale.shape[1]):
                start = torch.where(top, start, _moved(a, b, start, g))
            start = store(start)
        found, error = _descend(a, b, start, store, sweeps)
        better = error < least
        best, least = torch.where(better[:, None], found, best), torch.where(better, error, least)
    return best


def _descend(
    a: Tensor, b: Tensor, scale: Tensor, store: Callable[[Tensor], Tensor], sweeps: int
) -> tuple[Tensor, Tensor]:
    least = _error(a, b, scale)
    for _ in range(sweeps):
        for g in range(scale.shape[1]):
            tried = store(_moved(a, b, scale, g))
            error = _error(a, b, tried)
            better = error < least
            scale = torch.where(better[:, None], tried, scale)
            least = torch.where(better, error, least)
    return scale, least


def _moved(a: Tensor, b: Tensor, scale: Tensor, g: int) -> Tensor:
    """`scale` with group g at its best for the others; a group of zero levels, or one that would turn its sign, stays."""
    curvature = a[:, g, g]
    slope = b[:, g] - (a[:, g] * scale).sum(-1)
    wanted = scale[:, g] + slope / torch.where(curvature > 0, curvature, torch.inf)
    moved = scale.clone()
    moved[:, g] = torch.where(wanted > 0, wanted, scale[:, g])
    return moved


def _error(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """s A s^T - 2 b s^T [N]: a row's output error but for what the weight alone gives."""
    wide = scale.double()
    return ((a @ wide[..., None]).squeeze(-1) * wide).sum(-1) - 2 * (b * wide).sum(-1)
