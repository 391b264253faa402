"""Hundreds of broken and hostile inputs, seeded; none may crash, hang, write elsewhere, or take much memory.

    python benchmarks/hostile.py --count 400 --seed 0

Prints each fault with the seed that repeats it, and the number of cases. Results go to benchmarks/results/hostile.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from hostile import cases, run_case
from tiny_models import save_model

RESULTS = Path(__file__).parent / "results" / "hostile.json"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, codes, faults, most = time.monotonic(), Counter[int](), [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text("".join(f"The {n}th line of {n * n % 97} words. " for n in range(700)))
        from quantkit import quantize

        save_model(folder / "plain")
        quantize(
            str(folder / "plain"),
            "fireq",
            folder / "quantized",
            calib=str(text),
            samples=4,
            seqlen=64,
        )
        sources = {"plain": folder / "plain", "quantized": folder / "quantized", "text": text}
        for number in range(arguments.count):
            case = cases(random.Random(arguments.seed * 1_000_000 + number), 1)[0]
            result = run_case(sources, folder / "case", case)
            codes[result.code] += 1
            most = max(most, result.grown)
            if result.faults:
                faults.append({"number": number, "what": result.what, "faults": result.faults})
                print(f"{number}: {result.what}: {result.faults}\n{result.stderr}", flush=True)
            elif number % 50 == 49:
                print(f"{number + 1} cases, {len(faults)} with faults", flush=True)
    summary = {
        "cases": arguments.count, "seed": arguments.seed, "faults": faults, "exit_codes": dict(codes),
        "most_memory": most, "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    print({k: v for k, v in summary.items() if k != "faults"} | {"faults": len(faults)})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
