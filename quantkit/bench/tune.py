"""Finds the fastest configuration of each GPU kernel at each size, and keeps it for this GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from quantkit.bench.case import Case
from quantkit.bench.ops import OURS, Progress
from quantkit.bench.timing import compare
from quantkit.errors import QuantkitError
from quantkit.kernels.gpu import tuning

_SECONDS = 0.02  # for one configuration: a graph of 64 calls, seven times at least


def tune_cases(
    cases: list[tuple[str, Callable[[], Case]]],
    device: torch.device,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Tune what each case looks up; gives a line for each configuration that was found.

    Raises:
        QuantkitError: there is no GPU, whose kernels alone have configurations.
    """
    name = tuning.gpu_name(device)
    if name is None:
        raise QuantkitError("--tune: finds configurations of GPU kernels; use --device cuda")
    done: set[Any] = set()
    for number, (what, make) in enumerate(cases):
        if progress:
            progress(number, len(cases), what)
        run = make().runs[OURS]
        with tuning.asked() as wanted:
            run(0)
        for (op, key), candidates in wanted.items():
            if (op, key) in done:
                continue
            done.add((op, key))
            best = tuning.tune(op, key, candidates, partial(_seconds, op, key, run, device), name)
            yield f"{op} {' '.join(map(str, key))}: {best}"


def _seconds(
    op: str,
    key: tuple[int | str, ...],
    run: Callable[[int], object],
    device: torch.device,
    config: tuning.Config,
) -> float:
    with tuning.trying(op, key, config):
        return compare({op: run}, device, _SECONDS)[op].median
