"""Mixed precision beside uniform widths: perplexity on the bundled Llama and on the same with planted outliers.

    python benchmarks/mixed_precision.py

W4A16 in groups of 128 with GPTQ and searched scales, as `--recipe int4 --set weights.rounding=gptq --set
weights.clip=mse`, at a uniform width, and with `--target-bits`. Results go to benchmarks/results/mixed_precision.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from perplexity import measure, planted

from quantkit import load, quantize
from quantkit.calibration.data import read_text, tokenize
from quantkit.models.names import bundled_path
from quantkit.models.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "mixed_precision.json"
SETTINGS = ["weights.rounding=gptq", "weights.clip=mse"]
RUNS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("uniform 3", ["weights.bits=3"], {}),
    ("mixed, 3.5 bits", [], {"target_bits": 3.5}),
    ("uniform 4", [], {}),
    ("mixed, as uniform 4", [], {"target_bits": 4.1302}),
    ("mixed, 4.5 bits", [], {"target_bits": 4.5}),
    ("mixed of 4 and 8, 4.5 bits", [], {"target_bits": 4.5, "widths": [4, 8]}),
    ("uniform 5", ["weights.bits=5"], {}),
    ("uniform 8", ["weights.bits=8"], {}),
]


def main() -> None:
    tokens = tokenize(load_tokenizer(bundled_path()), read_text("sample", split="test"))
    rows: list[dict[str, Any]] = []
    print("| weights | bits with scales | loss, plain | loss, outliers |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        sources = {"plain": bundled_path(), "outliers": planted(Path(name))}
        original = {kind: measure(load(path), tokens) for kind, path in sources.items()}
        for title, settings, target in RUNS:
            row: dict[str, Any] = {"weights": title, "settings": SETTINGS + settings} | target
            for kind, path in sources.items():
                out = Path(name) / "out"
                report = quantize(
                    str(path), "int4", out, overrides=SETTINGS + settings, overwrite=True, **target
                )
                # Both checkpoints are in bf16.
                size = report["linear_bytes"]
                row[f"{kind}_bits"] = 16 * size["after"] / size["before"]
                row[f"{kind}_loss"] = measure(load(out), tokens) / original[kind] - 1
            rows.append(row)
            print(
                f"| {title} | {row['plain_bits']:.3f} | {row['plain_loss']:.2%} | {row['outliers_loss']:.2%} |",
                flush=True,
            )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULTS.write_text(
        json.dumps({"bf16": original, "rows": rows, "versions": versions}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
