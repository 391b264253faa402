"""The process of the `quantkit` command: at its begin and its end Python itself takes a second or two, which none needs."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from typing import NoReturn

from quantkit.cli.main import main
from quantkit.integrations.on_import import when_imported


def run() -> NoReturn:
    """The console script."""
    _collect_seldom(until="transformers.modeling_utils")
    code: object = 1
    try:
        main()
    except SystemExit as left:
        code = left.code
    _end(code if isinstance(code, int) else 1)


def _collect_seldom(until: str) -> None:
    """Look for cycles once in 100,000 new objects until the module `until` is imported.

    torch and transformers make a million objects that live as long as the process: looking through them again and
    again takes a sixth of the time that importing them does.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 20, 20)
    when_imported(until, lambda: gc.set_threshold(*usual))


def _end(code: int) -> NoReturn:
    """Leave without taking those objects apart, which takes longer than a plan does; exit handlers run."""
    others = set(threading.enumerate()) - {threading.main_thread()}
    if any(not thread.daemon for thread in others):
        sys.exit(code)  # Python waits for them
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or 1
    except OSError as error:
        print(f"error: stdout: {error.strerror}", file=sys.stderr)
        code = code or 1
    sys.stderr.flush()
    os._exit(code)
