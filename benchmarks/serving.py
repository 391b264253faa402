"""Many requests in a row against `quantkit serve`, and transformers' own logits beside ours.

    python benchmarks/serving.py llama-fireq --requests 1000 --native llama-int4 --output serving.json
    python benchmarks/serving.py llama-crossquant-w4a4 --requests 0 --native llama-crossquant-w4a4

Fails where a request fails, or where the server's memory grows by 5 % or more after the first hundred. The server and its client need
`pip install 'quantkit[serving]'`, the logits compressed-tensors.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

_WARM = 100
_GROWTH = 0.05
_PROMPTS = ("In the beginning", "And it came to pass", "Blessed is the man", "The king said")


def main(
    model: Annotated[str, typer.Argument(help="A folder that quantkit wrote.")],
    requests: Annotated[int, typer.Option(help="In a row; 0 serves nothing.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Of each answer, at most.")] = 16,
    native: Annotated[
        str | None,
        typer.Option(help="A checkpoint without INT4 cache: logits beside transformers'."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    """Serve, ask, and look at the server's memory."""
    report: dict[str, Any] = {"model": model, "requests": requests, "tokens": tokens}
    if requests:
        report |= _serve(model, requests, tokens)
    if native is not None:
        report["log-probabilities"] = {"model": native} | _logits(native)
    typer.echo(json.dumps(report, indent=2))
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if requests and (report["failed"] or report["growth"] >= _GROWTH):
        raise typer.Exit(1)


def _serve(model: str, requests: int, tokens: int) -> dict[str, Any]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "quantkit", "serve", model, "--host", "127.0.0.1"]
    with subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as server:
        try:
            assert server.stdout is not None
            if not server.stdout.readline():
                raise typer.Exit(1)
            return _ask(server.pid, port, model, requests, tokens)
        finally:
            server.terminate()


def _ask(pid: int, port: int, model: str, requests: int, tokens: int) -> dict[str, Any]:
    failed, seconds, memory = 0, [], {}
    for number in range(1, requests + 1):
        started = time.perf_counter()
        failed += not _one(port, model, _PROMPTS[number % len(_PROMPTS)] * (1 + number % 9), tokens)
        seconds.append(time.perf_counter() - started)
        if number % _WARM == 0:
            memory[number] = _resident(pid)
    first, last = memory[_WARM], memory[max(memory)]
    return {
        "failed": failed,
        "median_ms": round(1000 * statistics.median(seconds), 1),
        "resident_mb": {number: round(b / 1e6, 1) for number, b in memory.items()},
        "growth": round(last / first - 1, 4),
    }


def _one(port: int, model: str, prompt: str, tokens: int) -> bool:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return bool(json.load(answer)["choices"][0]["text"])
    except (urllib.error.URLError, TimeoutError, KeyError, ValueError):
        return False


def _resident(pid: int) -> int:
    """Bytes of a process's memory (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _logits(model: str) -> dict[str, Any]:
    """Log-probabilities of the bundled sample's tokens, transformers' alone beside quantkit.load's.

    Each beside itself with the eager attention, too: what another order of the same sums does.
    """
    import torch
    from vllm_serving import compare, model_scores, native_model, windows

    from quantkit import load
    from quantkit.models.names import find_model

    path, texts = find_model(model), windows()
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        scores = []
        for way, loader in (("transformers", native_model), ("quantkit", load)):
            loaded: Any = loader(path, dtype=dtype)
            scores.append(model_scores(loaded, texts))
            loaded.set_attn_implementation("eager")
            found[f"{name}, {way} and itself"] = compare(scores[-1], model_scores(loaded, texts))
        found[f"{name}, transformers and quantkit"] = compare(*scores)
    return found


if __name__ == "__main__":
    typer.run(main)
