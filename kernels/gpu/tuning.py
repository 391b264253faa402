"""Which configuration a kernel runs with: measured ones as data, a heuristic where there is none.

Looked up, in this order, in the user's cache (`$QUANTKIT_CACHE` or `~/.cache/quantkit`, under
`tuning/<GPU>.json`), in the table that comes with the package (`tuned/<GPU>.json`), and else the
heuristic is taken. Nothing is ever tuned while a model runs: `quantkit bench ops --tune` does that.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..cpu.native import cache_folder

_LOG = logging.getLogger("quantkit")
_DEFAULT_PROCESSORS = 132
Config = dict[str, int]
Key = tuple[int | str, ...]


def gpu_name(device: torch.device) -> str | None:
    """The GPU's name as its tables are called, e.g. `NVIDIA_H200`; None on a CPU."""
    if device.type != "cuda":
        return None
    return re.sub(r"[^A-Za-z0-9]+", "_", torch.cuda.get_device_name(device)).strip("_")


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU; an H200's where there is none."""
    if device.type != "cuda":
        return _DEFAULT_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def choose(
    op: str,
    key: Key,
    candidates: list[Config],
    heuristic: Config,
    device: torch.device | None = None,
) -> Config:
    """The configuration for `op` at `key` (sizes, with the number of rows rounded up to a power of two).

    An entry that is no longer among the candidates is stale, and passed over.
    """
    if _ASKED is not None:
        _ASKED[op, key] = candidates
    if (op, key) in _TRIED:
        return _TRIED[op, key]
    name = gpu_name(device or _current())
    if name is None:
        return heuristic
    entry = f"{op} {' '.join(map(str, key))}"
    for table in _tables(name):
        found = table.get(entry)
        if found in candidates:
            return found
    return heuristic


_ASKED: dict[tuple[str, Key], list[Config]] | None = None
_TRIED: dict[tuple[str, Key], Config] = {}


@contextmanager
def asked() -> Iterator[dict[tuple[str, Key], list[Config]]]:
    """Collects what is looked up within: (op, key) -> candidates. Not for several threads."""
    global _ASKED
    _ASKED = {}
    try:
        yield _ASKED
    finally:
        _ASKED = None


@contextmanager
def trying(op: str, key: Key, config: Config) -> Iterator[None]:
    """Within, `choose` gives this configuration for this op and key. Not for several threads."""
    _TRIED[op, key] = config
    try:
        yield
    finally:
        del _TRIED[op, key]


def record(op: str, key: Key, config: Config, name: str) -> None:
    """Keep a measured configuration in the user's cache, for the GPU of this name."""
    path = user_table(name)
    table = _read(path)
    table[f"{op} {' '.join(map(str, key))}"] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(table, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    _tables.cache_clear()


def tune(
    op: str,
    key: Key,
    candidates: list[Config],
    seconds: Callable[[Config], float],
    name: str,
) -> Config:
    """The candidate that `seconds` finds fastest, recorded; one that cannot run counts as slowest.

    Raises:
        RuntimeError: none could run.
    """
    best: tuple[float, Config] | None = None
    for config in candidates:
        try:
            time = seconds(config)
        except Exception as error:  # out of shared memory or registers: Triton's own classes
            _LOG.debug("%s %s: %s cannot run: %s", op, key, config, error)
            continue
        if best is None or time < best[0]:
            best = (time, config)
    if best is None:
        raise RuntimeError(f"{op} {key}: none of {len(candidates)} configurations could run")
    record(op, key, best[1], name)
    return best[1]


def user_table(name: str) -> Path:
    """Where this GPU's measured configurations are kept."""
    return cache_folder() / "tuning" / f"{name}.json"


def _current() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=8)
def _tables(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return _read(user_table(name)), _read(Path(__file__).parent / "tuned" / f"{name}.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _LOG.warning("%s: cannot be read (%s), its tuned configurations are not used", path, error)
        return {}
    return table if isinstance(table, dict) else {}
