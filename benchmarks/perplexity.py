"""Perplexity of every recipe, on the bundled Llama and on the same with planted outliers, in bf16 as served.

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
    ("quest-hadamard-w8a8", []),
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
    parser = argparse.ArgumentParser(description="Perplexities of every recipe.")
    parser.add_argument("--recipes", help="only these, separated by commas; the other rows stay")
    only = parser.parse_args().recipes
    names = only.split(",") if only else [*(r for r, _ in RUNS), DYNAMIC]
    tokens = tokenize(load_tokenizer(bundled_path()), read_text("sample", split="test"))
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
                before, after = (report["linear_bytes"][key] for key in ("before", "after"))
                row["size"] = after / before if before else None
            keep(row, original)
        if DYNAMIC in names:
            keep(dynamic_form(sources, original, tokens), original)


def keep(row: dict[str, Any], original: dict[str, float]) -> None:
    """Show a row, and put it into the results in the place of an older one."""
    show(row)
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    same = ("recipe", "settings")
    rows = [r for r in rows if any(r[key] != row[key] for key in same)] + [row]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    data = {
        "bf16": original,
        "rows": sorted(rows, key=place),
        "versions": versions,
        "machine": machine,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(data, indent=2) + "\n")


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
