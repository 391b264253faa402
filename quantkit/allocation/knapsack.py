"""One option for each item, the least cost within a budget: the multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Parts into which what can be spent is cut: sizes are rounded up to them, so that the budget holds.
_PARTS = 1 << 14


def choose(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """The option of each item that makes the sum of costs the least, with a sum of sizes of at most `budget`.

    By dynamic programming over the budget in 16384 parts. Exact where sizes are multiples of a part; else each
    item may be taken for up to one part larger than it is, and what that leaves is spent afterwards, the best
    cost for its size first.

    Args:
        sizes, costs: per item, of each of its options.

    Raises:
        ValueError: the least sizes together are larger than the budget.
    """
    least = [min(options) for options in sizes]
    spare = budget - sum(least)
    if spare < 0:
        raise ValueError(f"at least {sum(least)} are needed, the budget is {budget}")
    part = max(1, -(-spare // _PARTS))
    width = spare // part + 1
    best = np.zeros(width)
    taken = np.zeros((len(sizes), width), dtype=np.int16)
    for item, (options, prices) in enumerate(zip(sizes, costs)):
        found = np.full(width, np.inf)
        for option, (size, price) in enumerate(zip(options, prices)):
            steps = -(-(size - least[item]) // part)
            if steps >= width:
                continue
            total = np.full(width, np.inf)
            total[steps:] = best[: width - steps] + price
            better = total < found
            found[better], taken[item, better] = total[better], option
        best = found
    chosen, left = [0] * len(sizes), width - 1
    for item in reversed(range(len(sizes))):
        chosen[item] = int(taken[item, left])
        left -= -(-(sizes[item][chosen[item]] - least[item]) // part)
    return _spend(sizes, costs, chosen, budget)


def _spend(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], chosen: list[int], budget: int
) -> list[int]:
    """Exchange single options for better ones as long as one fits into what is left."""
    while True:
        left = budget - sum(options[c] for options, c in zip(sizes, chosen))
        moves = [
            ((costs[i][c] - costs[i][o]) / max(1, sizes[i][o] - sizes[i][c]), i, o)
            for i, c in enumerate(chosen)
            for o in range(len(sizes[i]))
            if costs[i][o] < costs[i][c] and sizes[i][o] - sizes[i][c] <= left
        ]
        if not moves:
            return chosen
        _, item, option = max(moves)
        chosen[item] = option
