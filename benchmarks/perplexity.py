"""Perplexity of every recipe, on the bundled Llama and on the same with planted outliers: the README's table.

    python benchmarks/perplexity.py

Protocol gptq on the held-out sample, calibration on the bundled calibration text. Results go to
benchmarks/results/perplexity.json with the versions and the processor. `--recipes gptq,fireq` measures those
anew and keeps the other rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from quantkit import load, quantize
from quantkit.calibration.data import read_text, tokenize
from quantkit.evaluate.dynamic import dynamic_crossquant
from quantkit.evaluate.perplexity import perplexity
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.writer import save_tensors
from quantkit.models.names import bundled_path
from quantkit.models.outliers import plant_outliers
from quantkit.models.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "perplexity.json"
RUNS: list[tuple[str, list[str]]] = [
    ("int8", []),
    ("int4", []),
    ("gptq", []),
    ("gptq-refined", []),
    ("crossquant", []),
    ("crossquant-w4a8", []),
    ("crossquant-w4a4", []),
    ("kv4", []),
    ("fireq", []),
    ("fireq", ["rope_scaling=null"]),
    ("fireq", ["kv_cache=null"]),
    ("quest-hadamard", []),
    ("quest-hadamard-offline", []),
    ("quest-hadamard-w4a4", []),
    ("quest-hadamard-w4a4kv4", []),
]
SEQLEN = 512


def planted(folder: Path) -> Path:
    """The bundled model with outliers, in a new folder."""
    import shutil

    target = folder / "llama-outliers"
    shutil.copytree(bundled_path(), target)
    checkpoint = Checkpoint(bundled_path())
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    save_tensors(plant_outliers(tensors, checkpoint.config), target / "model.safetensors")
    return target


def measure(model: Any, tokens: torch.Tensor) -> float:
    return perplexity(model, tokens, SEQLEN).ppl


DYNAMIC = "crossquant, the paper's dynamic form"


def main() -> None:
    parser = argparse.ArgumentParser(description="The README's table of perplexities.")
    parser.add_argument("--recipes", help="only these, separated by commas")
    only = parser.parse_args().recipes
    names = only.split(",") if only else [*(r for r, _ in RUNS), DYNAMIC]
    tokens = tokenize(load_tokenizer(bundled_path()), read_text("sample", split="test"))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        sources = {"plain": bundled_path(), "outliers": planted(Path(name))}
        original = {kind: measure(load(path), tokens) for kind, path in sources.items()}
        print(f"bf16: {original}", flush=True)
        for recipe, settings in RUNS:
            if recipe not in names:
                continue
            row: dict[str, Any] = {"recipe": recipe, "settings": settings}
            for kind, path in sources.items():
                out, started = Path(name) / "out", time.perf_counter()
                report = quantize(str(path), recipe, out, overrides=settings, overwrite=True)
                row[f"{kind}_seconds"] = round(time.perf_counter() - started, 1)
                row[kind] = measure(load(out), tokens)
                row[f"{kind}_ratio"] = row[kind] / original[kind]
                row["size"] = report["linear_bytes"]["after"] / report["linear_bytes"]["before"]
            rows.append(row)
            show(row)
        if DYNAMIC in names:
            rows.append(dynamic_form(sources, original, tokens))
            show(rows[-1])
    if only and RESULTS.exists():
        kept = json.loads(RESULTS.read_text())["rows"]
        rows = sorted([r for r in kept if r["recipe"] not in names] + rows, key=place)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {"bf16": original, "rows": rows, "versions": versions, "machine": machine}, indent=2
        )
        + "\n"
    )


def place(row: dict[str, Any]) -> int:
    """Where a row stands in the table."""
    run = (row["recipe"], row["settings"])
    return RUNS.index(run) if run in RUNS else len(RUNS)


def dynamic_form(
    sources: dict[str, Path], original: dict[str, float], tokens: torch.Tensor
) -> dict[str, Any]:
    """CrossQuant W8A8 as its paper evaluates it, beside the folded one that is served."""
    row: dict[str, Any] = {
        "recipe": DYNAMIC,
        "settings": [],
        "size": None,
    }
    for kind, path in sources.items():
        model = load(path)
        with dynamic_crossquant(model):
            row[kind] = measure(model, tokens)
        row[f"{kind}_ratio"] = row[kind] / original[kind]
    return row


def show(row: dict[str, Any]) -> None:
    name = " ".join([row["recipe"], *(f"--set {s}" for s in row["settings"])])
    size = f"{row['size']:.3f}" if row["size"] else "-"
    print(
        f"| {name} | {size} | {row['plain_ratio']:.4f} | {row['outliers_ratio']:.4f} |", flush=True
    )


if __name__ == "__main__":
    main()
