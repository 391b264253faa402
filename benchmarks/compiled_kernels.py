"""Compile every Triton kernel for GPUs that are not there, and say what came out.

    python benchmarks/compiled_kernels.py [--only REGEX] [--capability 90] [--output FILE.json [--update]]

For each kernel in each configuration that ships: registers, spills, shared memory, tensor-core
instructions, instructions for each element, and the time that these take at one instruction a cycle and
scheduler, beside the floor of memory and tensor cores. The times are predictions: no GPU is used.
Exits with 1 if a kernel is not what its configuration expects.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # it replaces the compiler
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@dataclass(frozen=True)
class Gpu:
    """Makers' figures: processors, clock in Hz, bytes per second, dense 16- and 8-bit operations per second."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    wide: float
    narrow: float


GPUS = {
    80: Gpu("A100", 108, 1.41e9, 2.04e12, 312e12, 624e12),
    89: Gpu("L40S", 142, 2.52e9, 0.864e12, 362e12, 733e12),
    90: Gpu("H200", 132, 1.83e9, 4.8e12, 989e12, 1979e12),
    100: Gpu("B200", 148, 1.85e9, 8.0e12, 2250e12, 4500e12),
}


def measure(task: tuple[int, int]) -> dict[str, Any]:
    """Compile build number task[0] for compute capability task[1]."""
    from quantkit.kernels.gpu.build import compile_build, shipped

    number, capability = task
    build = list(shipped())[number]
    row: dict[str, Any] = {"kernel": build.name, "capability": capability}
    try:
        compiled = compile_build(build, capability)
    except Exception as error:  # Triton's, of many classes
        return row | {"problems": [f"{type(error).__name__}: {str(error).splitlines()[:1]}"]}
    gpu = GPUS[capability]
    loop = sum(compiled.loop.values())
    instructions = loop or sum(compiled.instructions.values())
    elements = build.tile["elements"]
    issue = instructions * build.num_warps / 4 / gpu.processors / gpu.clock
    eight_bit = compiled.count(r".*(QGMMA|IGMMA|QMMA|IMMA)") > 0
    floor = max(
        build.tile["bytes"] / gpu.bandwidth,
        build.tile.get("operations", 0) / (gpu.narrow if eight_bit else gpu.wide),
    )
    return row | {
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared": compiled.shared,
        "tensor_core": compiled.count(r".*MMA"),
        "instructions": sum(compiled.instructions.values()),
        "tile": instructions,
        "per_element": instructions * build.num_warps * 32 / elements,
        "predicted_us_per_million": 1e12 * max(issue, floor) / elements,
        "floor_us_per_million": 1e12 * floor / elements,
        "problems": compiled.problems(),
    }


def merged(path: str, version: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a file of the same Triton, with new ones in their places; of kernels that still ship."""
    from quantkit.kernels.gpu.build import shipped

    with open(path, encoding="utf-8") as file:
        kept = json.load(file)
    if kept["triton"] != version:
        raise SystemExit(f"{path} was made with Triton {kept['triton']}, this is {version}")
    found = {(row["kernel"], row["capability"]): row for row in (*kept["rows"], *rows)}
    wanted = ((build.name, capability) for build in shipped() for capability in build.capabilities)
    return [found[key] for key in wanted if key in found]


def table(rows: list[dict[str, Any]]) -> list[str]:
    head = (
        "kernel",
        "for",
        "registers",
        "spills",
        "shared",
        "MMA",
        "a tile",
        "each",
        "predicted",
        "floor",
    )
    lines = [head]
    for r in rows:
        if "registers" not in r:
            lines.append((r["kernel"], str(r["capability"]), *["-"] * 8))
            continue
        lines.append(
            (r["kernel"], str(r["capability"]), str(r["registers"]), str(r["spills"]), str(r["shared"]),
             str(r["tensor_core"]), str(r["tile"]), f"{r['per_element']:.2f}",
             f"{r['predicted_us_per_million']:.3f}", f"{r['floor_us_per_million']:.3f}")
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in lines
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="kernels whose name this regular expression finds"
    )
    parser.add_argument("--capability", type=int, choices=sorted(GPUS), help="only this one")
    parser.add_argument("--output", help="a JSON file")
    parser.add_argument(
        "--update", action="store_true", help="keep the rows there of kernels not compiled now"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    import triton
    from quantkit.kernels.gpu.build import shipped

    tasks = [
        (number, capability)
        for number, build in enumerate(shipped())
        for capability in build.capabilities
        if re.search(arguments.only, build.name) and arguments.capability in (None, capability)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(arguments.jobs, len(tasks))), mp_context=spawn) as pool:
        rows = list(pool.map(measure, tasks, chunksize=4))
    print(
        f"Triton {triton.__version__}; shared memory in bytes, times in µs for a million elements"
    )
    print("\n".join(table(rows)))
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        print(f"{row['kernel']} for {row['capability']}: {'; '.join(row['problems'])}")
    print(f"{len(rows)} compiled, {len(bad)} with problems")
    if arguments.output and arguments.update:
        rows = merged(arguments.output, triton.__version__, rows)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({"triton": triton.__version__, "rows": rows}, file, indent=1)
            file.write("\n")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
