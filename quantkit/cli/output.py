"""How the command line speaks: results on stdout, progress and notes on stderr, errors in one line."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quantkit.errors import InternalError, QuantkitError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with the checkpoint; read it first."
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, default=str))


def print_table(rows: list[list[str]]) -> None:
    """Aligned columns, the first to the left; never cut or wrapped, so that a script can read a path from it."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


def print_servers(servers: dict[str, str]) -> None:
    """Who serves a checkpoint, a line each."""
    width = max(map(len, servers)) + 2
    for server, words in servers.items():
        out.print(f"  {server:<{width}}{words}", markup=False)


def note(text: str) -> None:
    """A line on stderr that is no result."""
    err.print(text, style="dim", markup=False)


# The exit code of what Ctrl-C has ended, as shells know it.
INTERRUPTED = 130


def debugging() -> bool:
    """Whether --debug was given, wherever it stands."""
    return "--debug" in sys.argv


def say_error(error: BaseException) -> int:
    """Print what went wrong in one line, and give the exit code: 2 bad input, 1 a failure of ours, 130 interrupted."""
    if debugging():
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        what, code = "interrupted; nothing that looks finished was left (quantize goes on when started again)", INTERRUPTED  # fmt: skip
    elif isinstance(error, QuantkitError):
        what, code = str(error), 2
    elif isinstance(error, InternalError):
        what, code = str(error), 1
    else:
        what, code = f"{type(error).__name__}: {error} (a bug of quantkit; --debug shows where)", 1
    print(f"error: {' '.join(what.split())}", file=sys.stderr, flush=True)
    return code


def hush() -> None:
    """Notes, progress and results are another process's to print."""
    out.quiet = err.quiet = True


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar with a rolling estimate of the whole job; nothing where stderr is no terminal."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def tell(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield tell


def size(count: float) -> str:
    """Bytes for people: 9.0 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
