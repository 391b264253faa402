"""Everything that a GPU has to show, in one run: ops, attention, whole models, as JSON files in a folder.

    python benchmarks/on_gpu.py FOLDER [--tune] [--quick] [--device cpu]

Ops at a Llama-3-8B's sizes beside cuBLAS and SDPA; attention at batch 1 and 8; a random Llama of 8B in the
formats of `int4` and `fireq` beside bf16 at batch 1, and at batch 16 with 8,192 tokens of context. With
--tune the kernels' configurations are measured first and kept. One part that fails is named, and the others
still run. Needs torch, triton and transformers alone; --quick and --device cpu try the script itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.bench.model import bench_model
from quantkit.bench.ops import bench_ops, make_cases, names
from quantkit.bench.random_model import random_baseline, write_random
from quantkit.bench.tune import tune_cases
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.load import load

ROWS = (1, 4, 16, 64, 256, 2048, 8192)


def ops(device: torch.device, seconds: float, tune: bool, **sizes: Any) -> dict[str, Any]:
    cases = make_cases(sizes.pop("ops", names()), device, **sizes)
    if tune:
        for line in tune_cases(cases, device):
            print(line, flush=True)
    return bench_ops(cases, device, seconds=seconds).to_dict()


def model(
    device: torch.device, seconds: float, size: str, recipe: str, batch: int, prompt: int, new: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_random(size, recipe, Path(folder) / size)
        return bench_model(
            lambda: load(path, device=str(device)),
            lambda: random_baseline(size, device),
            {"quantkit": Checkpoint(path).bytes, "bf16": 0},
            device, batch=batch, prompt=prompt, new_tokens=new, seconds=seconds,
        ).to_dict()  # fmt: skip


def summary(found: dict[str, Any]) -> list[str]:
    if "results" not in found:
        return [f"prompt x{found['prefill']['ratio']:.2f}, decode x{found['decode']['ratio']:.2f}"]
    return [
        f"{r['op']:24}{r['size']:28}{r['rows']:7}"
        f"{r['seconds']['quantkit']['median'] * 1e6:12.1f} µs  "
        f"{'  '.join(f'x{v:.2f} {n}' for n, v in r['ratio'].items())}  roofline {r['roofline']:.0%}"
        for r in found["results"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device, quick = torch.device(arguments.device), arguments.quick
    attention = {"ops": ["kv4_attention", "kv4_append"]}
    sizes: dict[str, Any] = {"rows": (1, 16), "shapes": ((256, 128),)} if quick else {"rows": ROWS}
    contexts = (64,) if quick else (4096, 32768)
    size = "random-1b" if quick else "random-8b"
    seconds = 0.01 if quick else 0.2
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "ops": partial(ops, device, seconds, arguments.tune, contexts=contexts, **sizes),
        "attention-batch-8": partial(
            ops, device, seconds, arguments.tune, contexts=contexts, batch=8, **attention
        ),
    }
    for recipe in ("int4", "fireq"):
        for batch, prompt in ((1, 8), (2, 16)) if quick else ((1, 512), (4, 4096), (16, 8192)):
            parts[f"{size}-{recipe}-batch-{batch}"] = partial(
                model,
                device,
                1.0 if quick else 15.0,
                size,
                recipe,
                batch,
                prompt,
                2 if quick else 64,
            )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, run in parts.items():
        print(f"== {name}", flush=True)
        try:
            found = run()
        except Exception:  # the rest is still worth its minutes
            traceback.print_exc()
            continue
        (arguments.folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print("\n".join(summary(found)), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
