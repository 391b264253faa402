"""From how many rows on expanding an INT4 weight beats torch's native product, on this machine.

Only where the C++ product cannot be had. The answer depends on the processor (1 to 64 rows were seen),
so it is measured once, on a layer of middling size, and kept in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from .native import cache_folder

_CANDIDATES = (2, 4, 8, 16, 32, 64)
_SIZE = 2048
_ROUNDS = 3


@lru_cache(maxsize=1)
def crossing_rows() -> int:
    """The largest of 1, 2, 4 ... 64 rows at which the native product is the faster one."""
    path = cache_folder() / "int4pack_rows.json"
    capability = torch.backends.cpu.get_cpu_capability()
    key = f"{capability}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    try:
        kept = json.loads(path.read_text())
        return int(kept[key])
    except (OSError, ValueError, KeyError, TypeError):
        kept = {}
    rows = _measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({key: rows}, file)
        os.replace(file.name, path)
    except OSError:
        pass  # a folder that cannot be written costs a measurement per process
    return rows


def _measure() -> int:
    from .. import int4_weight, int4pack

    words = torch.zeros(_SIZE, _SIZE // 8, dtype=torch.int32)
    repacked = int4pack.repack(words, torch.ones(_SIZE, _SIZE // 128, dtype=torch.bfloat16))
    assert repacked is not None
    weight, scale = repacked
    best = 1
    for rows in _CANDIDATES:
        x = torch.ones(rows, _SIZE, dtype=torch.bfloat16)
        times = [
            _seconds(partial(int4_weight.matmul, x, weight, scale, native=native))
            for native in (True, False)
        ]
        if times[0] > times[1]:
            break
        best = rows
    return best


def _seconds(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
