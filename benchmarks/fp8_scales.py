"""What FP8 group scales and FP8 products cost, and FP8 scales of keys and values: FireQ's formats one by one.

    python benchmarks/fp8_scales.py            three draws of calibration data; --table prints what is there

W4A8-FP8: group scales in bf16, or in FP8 with one factor per row (the `fireq` recipe) or one power of two per tensor
(the paper's); products of a code and its scale exact, as our kernels apply scales to a group's sum, or each rounded to
e4m3, as the paper's kernel multiplies. INT4 keys and values: their scales in bf16 or in e4m3. Measured as
benchmarks/accuracy.py does, in float32; results go to benchmarks/results/fp8_scales.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from accuracy import SAMPLES, SEQLEN, benches, processor

import quantkit
from quantkit.runtime import linear

RESULTS = Path(__file__).parent / "results" / "fp8_scales.json"
# Recipe, settings, and the products that are tried.
RUNS: list[tuple[str, list[str], tuple[str, ...]]] = [
    ("fireq", ["kv_cache=null", "weights.scale=bf16"], ("exact",)),
    ("fireq", ["kv_cache=null"], ("exact", "fp8")),
    ("fireq", ["kv_cache=null", "weights.scale=fp8_tensor"], ("exact", "fp8")),
    ("kv4", ["kv_cache.scale=bf16"], ("exact",)),
    ("kv4", [], ("exact",)),
]


@contextmanager
def products(form: str) -> Iterator[None]:
    """Within it, linears that are not fused multiply in that form."""
    original = linear.int4_fp8_linear
    linear.int4_fp8_linear = functools.partial(original, products=form)
    try:
        yield
    finally:
        linear.int4_fp8_linear = original


def measure(seeds: list[int], output: Path) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        for bench in benches(["llama"], Path(name), SAMPLES, outliers=True):
            for recipe, settings, forms in RUNS:
                for seed in seeds:
                    quantkit.quantize(
                        str(bench.path), recipe, out, samples=SAMPLES, seqlen=SEQLEN, seed=seed,
                        overrides=settings, overwrite=True,
                    )  # fmt: skip
                    for form in forms:
                        model = quantkit.load(out, dtype=torch.float32, fused=False)
                        with torch.no_grad(), products(form):
                            figures = bench.compare(model)
                        row = {"recipe": recipe, "settings": settings, "products": form}
                        rows.append(row | {"model": bench.name, "seed": seed} | figures)
                        loss = 100 * (figures["ratio"] - 1)
                        print(f"{_title(row)}, {bench.name}, seed {seed}: {loss:.3f} %", flush=True)
                    output.write_text(json.dumps(_described(rows), indent=1) + "\n")


def _described(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rows": rows,
        "protocol": f"gptq: windows of {SEQLEN} tokens; calibration {SAMPLES} x {SEQLEN}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
    }


def _title(row: dict[str, Any]) -> str:
    return " ".join([row["recipe"], *(f"--set {s}" for s in row["settings"])])


def table(path: Path) -> str:
    """Markdown: loss in percent and divergence in 1/1000 nat, mean (least to most) over the seeds."""
    rows = json.loads(path.read_text())["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    heads = [f"{what}, {m}" for m in models for what in ("loss %", "1000 x KL")]
    lines = [f"| recipe | products | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for title, form in dict.fromkeys((_title(row), row["products"]) for row in rows):
        cells = []
        for model in models:
            same = [
                r for r in rows if (_title(r), r["products"], r["model"]) == (title, form, model)
            ]
            cells += [
                _cell([100 * (r["ratio"] - 1) for r in same]),
                _cell([1000 * r["kl"] for r in same]),
            ]
        lines.append(f"| `{title}` | {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="of the calibration data, comma-separated")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    if not args.table:
        measure([int(seed) for seed in args.seeds.split(",")], args.output)
    print(table(args.output))


if __name__ == "__main__":
    main()
