"""CrossQuant's two forms: the share of activations that round to zero, and what each leaves of the model.

    python benchmarks/zero_fraction.py [MODEL...]

Shares are those of the output's quantkit/report.json, at eight bits: per token, with the column factor folded (the
`crossquant` recipe) and in the paper's dynamic form; over all inputs of all layers the mean, and the largest of one
input. Losses are measured as benchmarks/accuracy.py does, in float32; per token is the `int8` recipe. Results go to
benchmarks/results/zero_fraction.json, in the place of older rows of the same model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from accuracy import SAMPLES, SEQLEN, Bench, benches, processor

import quantkit
from quantkit.evaluate.dynamic import dynamic_crossquant

RESULTS = Path(__file__).parent / "results" / "zero_fraction.json"
FORMS = {"per_token": "per token", "folded": "folded", "dynamic": "dynamic"}


@torch.no_grad()
def measure(bench: Bench, out: Path) -> dict[str, Any]:
    """Shares of each layer and input, and losses, by form."""
    losses = {}
    for form, recipe in {"per_token": "int8", "folded": "crossquant"}.items():
        calibration = {"samples": SAMPLES, "seqlen": SEQLEN} if recipe == "crossquant" else {}
        report = quantkit.quantize(str(bench.path), recipe, out, overwrite=True, **calibration)
        losses[form] = bench.compare(quantkit.load(out, dtype=torch.float32))
    model = quantkit.load(bench.path, dtype=torch.float32)
    with dynamic_crossquant(model):
        losses["dynamic"] = bench.compare(model)
    layers = [layer["zero_fraction"] for layer in report["layers"]]
    return {"model": bench.name, "zero_fraction": layers, "losses": losses}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | form | rounded to zero, mean | largest | loss % |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for form, title in FORMS.items():
            shares = [place[form] for layer in row["zero_fraction"] for place in layer.values()]
            loss = 100 * (row["losses"][form]["ratio"] - 1)
            lines.append(
                f"| {row['model']} | {title} | {mean(shares):.2%} | {max(shares):.2%} | {loss:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["llama"], help="folders, hub ids or `llama`")
    args = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    with tempfile.TemporaryDirectory() as name:
        for bench in benches(args.models, Path(name), SAMPLES, outliers=True):
            row = measure(bench, Path(name) / "out")
            rows = [r for r in rows if r["model"] != bench.name] + [row]
            print(table([row]), flush=True)
    data = {
        "rows": rows,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
    }
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
