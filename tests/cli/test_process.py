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


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [("0", 0, ""), ("2", 2, ""), ("130", 130, ""), ("", 0, ""), ("'why'", 1, "why\n")],
)
def test_it_ends_as_main_does(code: str, status: int, said: str):
    done = run(f"sys.exit({code})")
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_left_alone(closed: str):
    assert run(f"sys.{closed}.close(); sys.exit(0)").returncode == 0
    assert run(f"sys.{closed} = None; sys.exit(0)").returncode == 0


def test_what_c_has_printed_arrives():
    done = run("import ctypes; ctypes.CDLL(None).printf(b'from C'); sys.exit(0)")
    assert done.stdout == "from C"


def test_whoever_watches_sees_the_end(tmp_path):
    code = "import sys; from quantkit.cli.process import run; sys.argv = ['quantkit', '--version']; run()"
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "cProfile", "-o", str(tmp_path / "profile"), str(script)]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "profile").stat().st_size


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
