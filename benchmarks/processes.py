"""A child process watched: what it printed, how long it took, how much memory it and its children held together."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def run(command: list[str]) -> dict[str, Any]:
    """Run to the end: wall seconds, and the largest resident memory of the process and its children together.

    Raises:
        RuntimeError: it failed; the message holds the end of what it printed.
    """
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.1):
                peak = max(peak, resident(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
        seconds = time.perf_counter() - started
        if code:
            err.seek(0)
            raise RuntimeError(err.read().decode(errors="replace")[-600:])
        out.seek(0)
        text = out.read().decode(errors="replace")
    return {"wall_seconds": seconds, "peak_bytes": peak, "stdout": text}


def resident(root: int) -> int:
    """Resident bytes of a process and all below it, from /proc."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name in parentheses may hold anything: what follows the last one is fixed.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)], pages[int(entry.name)] = int(fields[1]), int(fields[21])
    family, added = {root}, True
    while added:
        more = {pid for pid, parent in parents.items() if parent in family} - family
        added = bool(more)
        family |= more
    return sum(pages.get(pid, 0) for pid in family) * os.sysconf("SC_PAGE_SIZE")
