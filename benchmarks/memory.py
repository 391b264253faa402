"""Peak memory and speed of quantizing models that are never in memory as a whole.

    python benchmarks/memory.py                    # 1B: plain rounding and fireq; the curve over layers; copying
    python benchmarks/memory.py --size random-8b --recipes int4 --curve ""

Models are random Llamas in bf16, generated into --folder and removed afterwards. Each run is a process of its own,
whose peak is the kernel's VmHWM. Results go to benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "memory.json"
# Runs in the child: the plan's estimate, then the work, then what the kernel saw.
_CHILD = """
import json, sys, time
from quantkit import memory, quantize, Recipe
from quantkit.plan import make_plan
model, recipe, out, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
sizes = {k: settings[k] for k in ("samples", "seqlen") if k in settings}
planned = make_plan(model, Recipe.load(recipe), **sizes).estimate.host_bytes
report = quantize(model, recipe, out, **settings)
print(json.dumps({"planned": planned, "peak": memory.peak(), "seconds": report["seconds"],
                  "stages": report["stages"]}))
"""


def generate(size: str, layers: int | None, folder: Path) -> Path:
    """A random bf16 checkpoint of a size of quantkit.bench.random_model, tensor by tensor."""
    from quantkit.bench.random_model import SIZES
    from quantkit.formats.writer import OutputFolder
    from quantkit.models.names import bundled_path
    from quantkit.models.structure import build_skeleton, load_config

    config = SIZES[size] | ({"num_hidden_layers": layers} if layers else {})
    model: Any = build_skeleton(load_config(config, size), size)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with OutputFolder(folder) as out:
        for name, parameter in model.named_parameters():
            tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
            if "norm" not in name:
                tensor.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            out.add(name, tensor)
            out.end_of_layer()
        out.finish({}, lambda _: config)
    for file in bundled_path().glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def run(model: Path, recipe: str, out: Path, **settings: Any) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", _CHILD, str(model), recipe, str(out), json.dumps(settings)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    shutil.rmtree(out)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def copying(model: Path, folder: Path) -> float:
    """Bytes a second of copying the weights to the disk, as safely as an output is written."""
    total, started = 0, time.perf_counter()
    for file in model.glob("*.safetensors"):
        with file.open("rb") as source, (folder / "copy").open("wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)
            target.flush()
            os.fsync(target.fileno())
        total += file.stat().st_size
        (folder / "copy").unlink()
    return total / (time.perf_counter() - started)


def show(row: dict[str, Any]) -> None:
    mb = {key: row[key] / 1e6 for key in ("checkpoint", "peak", "planned")}
    print(
        f"{row['model']:<22} {row['recipe']:<8} checkpoint {mb['checkpoint']:7.0f} MB  "
        f"peak {mb['peak']:6.0f} MB ({row['peak'] / row['checkpoint']:.2f})  planned {mb['planned']:6.0f} MB  "
        f"{row['seconds']:7.1f} s  {row['stages']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="random-1b")
    parser.add_argument("--recipes", default="int4,fireq")
    parser.add_argument("--curve", default="4,8,16,32", help="numbers of layers, plain rounding")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--folder", default=None, help="where the models are made")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)

        def measure(label: str, model: Path, recipe: str, **settings: Any) -> None:
            total = sum(f.stat().st_size for f in model.glob("*.safetensors"))
            row = {"model": label, "recipe": recipe, "checkpoint": total} | settings
            row |= run(model, recipe, folder / "out", **settings)
            rows.append(row)
            show(row)

        model = generate(arguments.size, None, folder / "model")
        speed = copying(model, folder)
        print(f"copying: {speed / 1e6:.0f} MB/s", flush=True)
        for recipe in filter(None, arguments.recipes.split(",")):
            calibrated = {"samples": arguments.samples, "seqlen": arguments.seqlen}
            measure(arguments.size, model, recipe, **({} if recipe == "int4" else calibrated))
            row = rows[-1]
            rounding = sum(row["stages"].get(k, 0) for k in ("round", "copy", "save"))
            if recipe == "int4":
                row["bytes_per_second"] = row["checkpoint"] / rounding
                print(
                    f"plain rounding: {row['bytes_per_second'] / 1e6:.0f} MB/s, "
                    f"{row['bytes_per_second'] / speed:.2f} of copying",
                    flush=True,
                )
        shutil.rmtree(model)
        for layers in map(int, filter(None, arguments.curve.split(","))):
            model = generate(arguments.size, layers, folder / "model")
            measure(f"{arguments.size}, {layers} layers", model, "int4")
            shutil.rmtree(model)
    key = f"{arguments.size} {arguments.recipes}"
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__,
               "threads": torch.get_num_threads()}  # fmt: skip
    results[key] = {"copying": speed, "rows": rows, "machine": machine}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
