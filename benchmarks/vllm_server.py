"""vLLM's OpenAI server, started, asked and ended from another environment; for vllm_serving.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch

PYTHON_ENV = "QUANTKIT_VLLM_PYTHON"
START_SECONDS = 300
# Log-probabilities of tokens, and the likeliest tokens in their places.
Scores = tuple[torch.Tensor, torch.Tensor]


class Server:
    """vLLM's OpenAI server on a free port of this machine, as a context manager.

    Args:
        plugin: with quantkit's plugin; without it, stock vLLM.
        options: of vLLM's command line.
    """

    def __init__(self, folder: Path, *options: str, plugin: bool = True) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if not plugin:
            # As the plugin does: with AMX, vLLM rounds the activations of INT4 weights to INT8 by itself.
            variables |= {"VLLM_PLUGINS": "", "VLLM_CPU_INT4_W4A8": "0"}
        command = [
            *(vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"),
            *("--model", str(folder), "--served-model-name", "model", "--max-model-len", "512"),
            *("--host", "127.0.0.1", "--port", str(self.port), *options),
        ]
        self.process = subprocess.Popen(
            command, env=os.environ | variables, stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True, cwd=tempfile.gettempdir(),
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def ready(self) -> bool:
        """Wait until it answers (True) or has ended (False)."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).read()
                return True
            except OSError:
                time.sleep(1)
        return False

    def output(self) -> str:
        self.log.flush()
        self.log.seek(0)
        return self.log.read()

    def post(self, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps({"model": "model", "temperature": 0, **body}).encode(),
            {"content-type": "application/json"},
        )
        answer: dict[str, Any] = json.loads(urllib.request.urlopen(request, timeout=300).read())
        return answer

    def scores(self, windows: torch.Tensor) -> Scores:
        """Log-probability of each window's tokens after its first, and the likeliest tokens there."""
        values, likeliest = [], []
        for window in windows.tolist():
            answer = self.post(prompt=window, max_tokens=1, prompt_logprobs=1)
            entries = answer["choices"][0]["prompt_logprobs"][1:]
            values.append([e[str(token)]["logprob"] for e, token in zip(entries, window[1:])])
            likeliest.append(
                [next(int(t) for t, one in e.items() if one["rank"] == 1) for e in entries]
            )
        return torch.tensor(values), torch.tensor(likeliest)

    def memory(self) -> int:
        """Bytes of all its processes that no other process shares (proportional set size)."""
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = int(stat.read_text().rpartition(")")[2].split()[3])
                if session == self.process.pid:
                    rollup = (stat.parent / "smaps_rollup").read_text()
                    total += next(
                        int(line.split()[1]) * 1024
                        for line in rollup.splitlines()
                        if line.startswith("Pss:")
                    )
            except (OSError, StopIteration):
                continue
        return total


def vllm_python() -> str:
    python = os.environ.get(PYTHON_ENV)
    if not python:
        sys.exit(f"name the interpreter of an environment with vLLM and quantkit in ${PYTHON_ENV}")
    return os.path.abspath(python)  # servers start in another folder
