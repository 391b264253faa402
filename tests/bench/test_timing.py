import time

import torch

from quantkit.bench.timing import Ceilings, Timing, compare, copies

CPU = torch.device("cpu")


def test_quartiles():
    timing = Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (timing.low, timing.median, timing.high, timing.rounds) == (2.0, 3.0, 4.0, 5)


def test_the_slower_one_is_found_and_turns_are_taken():
    order: list[str] = []

    def slow(i: int) -> None:
        order.append("slow")
        time.sleep(4e-3)

    def fast(i: int) -> None:
        order.append("fast")
        time.sleep(2e-3)

    found = compare({"slow": slow, "fast": fast}, CPU, 0.05)
    assert 1.3 < found["slow"].median / found["fast"].median < 3
    measured = order[-4:]
    assert measured in (["slow", "fast", "fast", "slow"], ["fast", "slow", "slow", "fast"])


def test_every_call_gets_another_copy():
    seen: list[int] = []
    compare({"run": lambda i: seen.append(i) or time.sleep(1e-3)}, CPU, 0.01)
    assert seen[2:] == list(range(len(seen) - 2))


def test_copies_outlast_the_cache():
    assert copies(1 << 40, CPU) == 1
    assert copies(1, CPU) == 64
    assert copies(0, CPU) == 64


def test_the_floor_is_what_limits():
    ceilings = Ceilings(100.0, {"bf16": 10.0, "int8": 20.0})
    assert ceilings.floor(1000, 50, "bf16") == 10
    assert ceilings.floor(100, 50, "bf16") == 5
    assert ceilings.floor(100, 50, "int8") == 2.5
    assert ceilings.floor(100, 50, "fp8") == 5  # a machine without FP8 multiplies in bf16
