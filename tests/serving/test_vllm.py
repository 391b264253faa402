"""The plugin against the real vLLM: minutes, and an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import quantize

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("QUANTKIT_VLLM_PYTHON")
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        not (PYTHON and Path(PYTHON).is_file()),
        reason="QUANTKIT_VLLM_PYTHON names no interpreter of an environment with vLLM: make serving-env builds one",
    ),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where the parts find each other's checkpoints."""
    return tmp_path_factory.mktemp("checkpoints")


def test_the_example(work):
    """As its first lines say it is called, in vLLM's environment; the same words as from transformers."""
    folder = work / "example"
    quantize("llama", "int4", folder)
    prompt = "And it came to pass"
    said = []
    for python, name in ((PYTHON, "with_vllm"), (sys.executable, "with_transformers")):
        done = subprocess.run(
            [str(python), str(ROOT / "examples" / f"{name}.py"), str(folder), prompt],
            capture_output=True, text=True, env=os.environ | CPU,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        # vLLM's log may come behind it.
        said += [line for line in done.stdout.splitlines() if line.startswith(prompt)]
    assert len(said) == 2
    assert said[0] == said[1]


@pytest.mark.parametrize("part", ["clients", "experts", "broken", "parallel", "stock", "agree"])
def test_served_by_vllm(work, part):
    script = ROOT / "benchmarks" / "vllm_serving.py"
    done = subprocess.run(
        [sys.executable, str(script), part, "--work", str(work)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_plugin_inside_vllm():
    """The tests that vLLM's own interpreter has to run."""
    folder = ROOT / "tests" / "integrations" / "vllm"
    tests = [str(folder / f"test_{name}.py") for name in ("plugin", "rounding", "experts")]
    has_pytest = subprocess.run([str(PYTHON), "-c", "import pytest"], capture_output=True)
    if has_pytest.returncode:
        pytest.skip("that environment has no pytest")
    done = subprocess.run(
        [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
