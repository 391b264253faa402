"""Every Triton kernel compiles for every GPU it ships for, without a GPU: no spills, the instructions meant.

In processes of their own: Triton's interpreter, in which the other tests run, replaces the compiler.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compiled_kernels.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the repository")


def _compile(tmp_path: Path, *arguments: str) -> tuple[int, list[dict], str]:
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--output", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = json.loads(out.read_text())["rows"] if out.is_file() else []
    return done.returncode, rows, done.stdout[-3000:] + done.stderr[-3000:]


def test_some_for_hopper(tmp_path) -> None:
    """A product, attention, rows: the rest is under `slow`."""
    only = r"int4_gemm\[fp8, M16\]|decode, D128, bf16 scale\]|rows\[quantize, fp8, K4096"
    code, rows, printed = _compile(tmp_path, "--only", only, "--capability", "90", "--jobs", "1")
    assert code == 0, printed
    found = {row["kernel"].split("[")[0]: row for row in rows}
    assert set(found) == {"int4_gemm", "kv4_attention", "rows"}
    # What makes them fast: an H200 issues about 2.3 for a weight in the time that it reads one.
    assert found["int4_gemm"]["per_element"] < 1.6
    assert found["kv4_attention"]["per_element"] < 3.0
    assert found["int4_gemm"]["tensor_core"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "89", "90", "100"])
def test_all(capability: str, tmp_path) -> None:
    code, rows, printed = _compile(tmp_path, "--capability", capability, "--jobs", "1")
    assert code == 0, printed
    assert len(rows) > 60


def test_a_spill_is_a_problem() -> None:
    from collections import Counter

    from quantkit.kernels.gpu.build import Build, Compiled

    build = Build("x", None, {}, {}, tensor_core={90: "QGMMA"}, shared=1000)
    loads = Counter({"LDG.E.128": 50, "QGMMA.64x16": 2})
    assert Compiled(build, 90, 32, 0, 1000, loads, Counter(), "", "").problems() == []
    assert Compiled(build, 90, 32, 8, 1000, loads, Counter(), "", "").problems() == [
        "8 bytes spilled"
    ]
    trap = Compiled(build, 90, 32, 0, 0, Counter({"BPT.TRAP": 1}), Counter(), "", "").problems()
    assert len(trap) == 4
