"""What this process takes and what the machine has, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def _status(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes of memory that this process has had."""
    return _status("VmHWM")


def available() -> int | None:
    """Bytes that this process may still take: of the machine, and of the control group it is in; None if unknown."""
    found: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
                if line.startswith(("inactive_file ", "active_file ")):
                    used -= int(line.split()[1])
            found.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return max(0, min(found)) if found else None


def keep_bounded() -> None:
    """Keep what libraries hold back from growing with the work, in this process from now on."""
    _fix_thresholds()
    # oneDNN keeps a kernel for each shape that it has seen, 1024 of them: 300 MB where experts see ever other numbers of
    # tokens. It reads this when it is first used.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")


def _fix_thresholds() -> None:
    """Let glibc map what is large on its own and give it back when it is freed.

    By itself it raises the threshold to the largest block that was freed, takes the next ones from its heap, and then
    the peak depends on where the holes in it happen to lie: 565 to 730 MB were seen on one model. Small blocks are
    kept for reuse, since mapping costs about as much as a pass over the block.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def trim() -> None:
    """Give freed memory back to the system: glibc keeps it otherwise, and the peak creeps up layer by layer."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Within it Python looks for no cycles to free: a third of the time that a skeleton of 36,000 linears takes to build."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
