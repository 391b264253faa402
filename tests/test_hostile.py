"""Broken and hostile inputs: one line that says what is wrong, no traceback, nothing written where it does not belong.

Each case runs in a fork of this process, within a time and a memory limit. `benchmarks/hostile.py` runs many more.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hostile import Case, cases, run_case


@pytest.fixture(scope="module")
def sources(tiny, quantized, text):
    return {"plain": tiny(), "quantized": quantized("fireq"), "text": text}


@pytest.mark.parametrize("seed", range(12))
def test_hostile_input(sources: dict[str, Path], tmp_path: Path, seed: int):
    check(sources, tmp_path, cases(random.Random(seed), 1)[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1004))
def test_more_hostile_input(sources: dict[str, Path], tmp_path: Path, seed: int):
    for number, case in enumerate(cases(random.Random(seed), 25)):
        check(sources, tmp_path / str(number), case)


def check(sources: dict[str, Path], folder: Path, case: Case) -> None:
    result = run_case(sources, folder, case)
    assert not result.faults, f"{result.what}: {'; '.join(result.faults)}\n{result.stderr}"
