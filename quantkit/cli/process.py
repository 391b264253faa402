"""The process of the `quantkit` command: at its begin and its end Python itself takes a second and more, which none needs."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import threading
from typing import NoReturn

from quantkit.cli.main import main
from quantkit.integrations.on_import import when_imported


def run() -> NoReturn:
    """The console script."""
    collect_seldom(until="transformers.modeling_utils")
    code: object = 1
    try:
        main()
    except SystemExit as left:
        code = left.code
    _end(code)


def collect_seldom(until: str) -> None:
    """Look for cycles once in 100,000 new objects until the module `until` is imported.

    torch and transformers make a million objects that live as long as the process: looking through them again and
    again takes a sixth of the time that importing them does.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 20, 20)
    when_imported(until, lambda: gc.set_threshold(*usual))


def _end(code: object) -> NoReturn:
    """Leave as sys.exit(code) does, without taking those objects apart, which takes longer than a plan does."""
    others = set(threading.enumerate()) - {threading.main_thread()}
    watched = (
        sys.getprofile() is not None or sys.gettrace() is not None
    )  # and wants to write what it has seen
    if watched or any(not thread.daemon for thread in others) or not isinstance(code, int | None):
        sys.exit(code)  # type: ignore[arg-type]
    atexit._run_exitfuncs()
    status = code or 0
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError as error:
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                print(f"error: stdout: {error.strerror}", file=sys.stderr, flush=True)
            status = status or 1
    ctypes.CDLL(None).fflush(None)  # what C has printed
    os._exit(status)
