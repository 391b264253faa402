import itertools
import random

import pytest

from quantkit.allocation.knapsack import choose


def total(values, chosen):
    return sum(options[c] for options, c in zip(values, chosen))


@pytest.mark.parametrize("seed", range(30))
def test_it_finds_what_trying_everything_finds(seed: int):
    draw = random.Random(seed)
    sizes = [[draw.randint(0, 60) for _ in range(4)] for _ in range(5)]
    costs = [[draw.random() for _ in range(4)] for _ in range(5)]
    least = sum(min(options) for options in sizes)
    budget = least + draw.randint(0, 120)
    chosen = choose(sizes, costs, budget)
    assert total(sizes, chosen) <= budget
    best = min(
        total(costs, picked)
        for picked in itertools.product(range(4), repeat=5)
        if total(sizes, picked) <= budget
    )
    assert total(costs, chosen) == pytest.approx(best)


def test_large_sizes_come_close_and_never_go_over():
    """Bytes of a large model: each item is rounded up to a part, what is left over is spent."""
    draw = random.Random(0)
    weights = [draw.randint(10**6, 10**8) for _ in range(200)]
    sizes = [[w * b // 8 + w // 64 for b in (2, 3, 4, 5, 6, 8)] for w in weights]
    costs = [[draw.random() * 4.0**-b for b in (2, 3, 4, 5, 6, 8)] for _ in weights]
    budget = int(sum(weights) * 4.5 / 8)
    chosen = choose(sizes, costs, budget)
    assert 0.998 * budget < total(sizes, chosen) <= budget
    # The bound of the relaxed problem: no choice of parts can cost less.
    bound = 0.0
    for price in (2.0**n * 1e-16 for n in range(60)):
        relaxed = sum(min(c + price * s for c, s in zip(cs, ss)) for cs, ss in zip(costs, sizes))
        bound = max(bound, relaxed - price * budget)
    assert total(costs, chosen) < 1.1 * bound


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match="at least 7 are needed, the budget is 6"):
        choose([[3, 5], [4, 9]], [[1.0, 0.5], [1.0, 0.5]], 6)
    assert choose([[3, 5], [4, 9]], [[1.0, 0.5], [1.0, 0.5]], 7) == [0, 0]
