"""How the process of the command ends: at once, but not before what has to be done."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_RUN = """
import atexit, sys, threading, time
from quantkit.cli import process

def main():
    {body}

process.main = main
process.run()
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    code = _RUN.replace("{body}", body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", [0, 2, 130])
def test_its_exit_code_is_mains(code: int):
    assert run(f"sys.exit({code})").returncode == code


def test_what_was_printed_arrives_and_exit_handlers_run():
    done = run("atexit.register(print, 'handler'); print('x' * 100_000); sys.exit(0)")
    assert done.stdout == "x" * 100_000 + "\nhandler\n"


def test_a_thread_that_is_at_work_is_waited_for():
    done = run(
        "threading.Thread(target=lambda: (time.sleep(0.5), print('done'))).start(); sys.exit(3)"
    )
    assert (done.stdout, done.returncode) == ("done\n", 3)


def test_it_does_not_wait_for_objects_to_be_taken_apart():
    """Python's own end takes a second where torch and transformers are imported."""
    done = run(
        "class Slow:\n        def __del__(self): print('taken apart')\n"
        "    process.kept = Slow(); sys.exit(0)"
    )
    assert (done.stdout, done.returncode) == ("", 0)


def test_a_full_disk_at_the_end_is_told():
    code = _RUN.replace("{body}", "print('x'); sys.exit(0)")
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=buffered,
        )
    assert (done.stderr, done.returncode) == ("error: stdout: No space left on device\n", 1)


def test_cycles_are_looked_for_as_usual_once_transformers_is_there():
    done = run(
        "import gc; before = gc.get_threshold(); import transformers.modeling_utils; "
        "print(before[0], gc.get_threshold()[0] < 10_000); sys.exit(0)"
    )
    assert done.stdout == "100000 True\n"
