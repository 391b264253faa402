"""Every recipe against every peer that is installed: same checkpoints, same calibration tokens, one evaluator.

    python benchmarks/accuracy.py --peers-python /path/to/env/bin/python [--peers-python ...] [MODEL...]
    python benchmarks/accuracy.py --only '*w4a16*' --only int4         some of them, added to what is there
    python benchmarks/accuracy.py --only 'quantkit gptq*' --set rotation=null ...       ours with a setting, rows of their own
    python benchmarks/accuracy.py --seconds-only                       time and memory again, accuracy as it is
    python benchmarks/accuracy.py --accuracy-only --seeds 0,1,2        the other way round: beside other work
    python benchmarks/accuracy.py --seconds-only random-1b --samples 4 of a generated model
    python benchmarks/accuracy.py --table                              what is there, as Markdown

Each model is taken as it is and with planted outliers. Protocol gptq on the held-out sample, calibration on 64 blocks
of 512 tokens of the bundled calibration text. A peer runs in an environment of its own (`peers/run_*.py` say what they
need) and leaves a checkpoint of dequantized weights; rounding of activations is simulated here. Everything, the
original too, is measured in float32, so that the formats are compared and not bf16's own noise.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from memory import generate
from processes import run
from safetensors.torch import save_file

import quantkit
from quantkit.calibration.data import calibration_blocks, read_text, tokenize
from quantkit.errors import QuantkitError
from quantkit.evaluate.divergence import compare_windows, full_divergence_of
from quantkit.evaluate.perplexity import cut_windows, mean_loss, perplexity_of
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.writer import save_tensors
from quantkit.models.names import find_model, short_name
from quantkit.models.outliers import plant_outliers
from quantkit.models.tokenizer import load_tokenizer
from quantkit.recipe import recipe_names

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "accuracy.json"
SAMPLES, SEQLEN = 64, 512
FORMATS = {"w4a16": "W4A16", "w8a8": "W8A8-INT", "w4a8-int": "W4A8-INT", "w4a8-fp8": "W4A8-FP8"}
# Script -> the package it needs and the variants worth a row: method:format.
PEERS: dict[str, tuple[str, list[str]]] = {
    "run_auto_round.py": ("auto-round", ["autoround-200:w4a16", "rtn:w4a16"]),
    "run_llm_compressor.py": (
        "llmcompressor",
        [
            *("gptq:w4a16", "awq:w4a16", "rtn:w4a16"),
            *("sq-gptq:w8a8", "gptq:w8a8", "rtn:w8a8"),
            *("sq-gptq:w4a8-int", "gptq:w4a8-int", "rtn:w4a8-int"),
            *("gptq:w4a8-fp8", "sq-gptq:w4a8-fp8", "rtn:w4a8-fp8"),
        ],
    ),
    "run_torchao.py": ("torchao", ["intx:w4a16", "dynamic:w8a8", "dynamic-intx:w4a8-int"]),
    "run_hqq.py": ("hqq", ["hqq-g128:w4a16", "hqq-g64:w4a16"]),
    "run_quanto.py": ("optimum-quanto", ["quanto:w4a16", "quanto-static:w8a8"]),
}
# What other work on the machine changes.
COSTS = ("seconds", "wall_seconds", "peak_bytes")
Command = Callable[[Path, Path, Path, int], list[str]]


@dataclass(frozen=True)
class Job:
    """One way to quantize: its name in the table and the command that does it."""

    name: str
    ours: bool
    command: Command


def our_jobs(samples: int, settings: list[str]) -> list[Job]:
    """Every recipe with some settings; those with quantized keys and values also without, to stand beside peers of the same format."""
    jobs = []
    for recipe in recipe_names():
        variants = [settings]
        if quantkit.Recipe.load(recipe).kv_cache:
            variants.append([*settings, "kv_cache=null"])
        for variant in variants:
            words = [w for setting in variant for w in ("--set", setting)]

            def command(
                source: Path,
                blocks: Path,
                out: Path,
                seed: int,
                recipe: str = recipe,
                words: list[str] = words,
            ) -> list[str]:
                numbers = ["--seed", str(seed)]
                if quantkit.Recipe.load(recipe).needs_calibration:
                    numbers += ["--samples", str(samples), "--seqlen", str(SEQLEN)]
                return [sys.executable, "-m", "quantkit", "quantize", str(source), "-r", recipe, "-o", str(out),
                        "--overwrite", "--json", *numbers, *words]  # fmt: skip

            jobs.append(Job(" ".join([f"quantkit {recipe}", *words]), True, command))
    return jobs


def peer_jobs(pythons: list[str]) -> list[Job]:
    """Those whose package one of the interpreters has."""
    jobs = []
    for script, (package, variants) in PEERS.items():
        python = next((p for p in pythons if _has(p, package)), None)
        if python is None:
            print(f"left out: {package} is in none of the --peers-python", file=sys.stderr)
            continue
        for variant in variants:

            def command(
                source: Path,
                blocks: Path,
                out: Path,
                seed: int,
                start: tuple[str, ...] = (python, str(HERE / "peers" / script)),
                variant: str = variant,
            ) -> list[str]:
                return [*start, str(source), str(blocks), str(out), "--variant", variant, "--seed", str(seed)]  # fmt: skip

            jobs.append(Job(f"{package} {variant}", False, command))
    return jobs


def _has(python: str, package: str) -> bool:
    code = f"import importlib.metadata as m; m.version({package!r})"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


class Rounding:
    """A peer's rounding of activations, in front of its linears."""

    def __init__(self, description: dict[str, Any], linear: str) -> None:
        self.form = description
        self.scale = description.get("scales", {}).get(linear)

    def __call__(self, _: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        if self.form["type"] == "float":
            scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / self.form["levels"]
            return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale, *args[1:]
        if self.form.get("asymmetric"):
            low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
            scale = ((high - low) / 255).clamp_min(1e-12)
            zero = (-128 - low / scale).round().clamp(-128, 127)
            return ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale, *args[1:]
        if self.scale is not None:
            return (x / self.scale).round().clamp(-128, 127) * self.scale, *args[1:]
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / self.form["levels"]
        return (x / scale).round().clamp(-128, 127) * scale, *args[1:]


def load_result(out: Path) -> Any:
    """What a job left, ready to be measured."""
    if not (out / "peer.json").is_file():
        return quantkit.load(out, dtype=torch.float32)
    description = json.loads((out / "peer.json").read_text())
    model = quantkit.load(out, dtype=torch.float32, fused=False)
    if description["activations"]:
        for name in description["linears"]:
            hook = Rounding(description["activations"], name)
            model.get_submodule(name).register_forward_pre_hook(hook)
    return model


class Bench:
    """One checkpoint: its original, its calibration blocks per seed, its windows."""

    def __init__(self, name: str, path: Path, folder: Path, samples: int) -> None:
        self.name, self.path, self.folder, self.samples = name, path, folder, samples
        self.tokenizer = load_tokenizer(path)
        self._original: Any = None
        tokens = tokenize(self.tokenizer, read_text("sample", split="test"))
        self.windows = cut_windows(tokens, SEQLEN)

    @property
    def original(self) -> Any:
        """Loaded when first asked for: timings of large models do not need it."""
        if self._original is None:
            self._original = quantkit.load(self.path, dtype=torch.float32)
        return self._original

    def blocks(self, seed: int) -> tuple[Path, torch.Tensor]:
        path = self.folder / f"blocks-{seed}.safetensors"
        tokens = calibration_blocks(self.tokenizer, "bundled", self.samples, SEQLEN, seed).tokens
        save_file({"tokens": tokens}, str(path))
        return path, tokens

    def measure(self, job: Job, seed: int, *, seconds_only: bool) -> dict[str, Any]:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        path, tokens = self.blocks(seed)
        ran = run(job.command(self.path, path, out, seed))
        row: dict[str, Any] = {"name": job.name, "model": self.name, "seed": seed}
        row["samples"] = self.samples
        row |= {key: ran[key] for key in ("wall_seconds", "peak_bytes")}
        if job.ours:
            report = json.loads(ran["stdout"])
            row |= {"format": our_format(report), "seconds": report["seconds"]}
            row["versions"] = {"quantkit": report["version"], "torch": report["torch"]}
        else:
            peer = json.loads((out / "peer.json").read_text())
            row |= {"format": FORMATS[job.name.rpartition(":")[2]], "seconds": peer["seconds"]}
            row["versions"] = peer["versions"]
        return row if seconds_only else row | self.accuracy(out, tokens[0])

    def compare(self, model: Any) -> dict[str, Any]:
        """Divergence from the original and both perplexities, on the held-out windows."""
        windows = compare_windows(model, self.original, self.windows)
        return full_divergence_of(windows, SEQLEN).to_dict() | {
            "ppl": perplexity_of(windows.losses, SEQLEN).ppl,
            "original_ppl": perplexity_of(windows.original_losses, SEQLEN).ppl,
        }

    @torch.no_grad()
    def accuracy(self, out: Path, block: torch.Tensor) -> dict[str, Any]:
        model = load_result(out)
        result = self.compare(model)
        if (out / "peer.json").is_file():
            # The peer's own model, in bf16, and its simulation here must agree on a block.
            here = mean_loss(model(block[None], use_cache=False).logits[0, :-1], block)
            own = json.loads((out / "peer.json").read_text())["check_loss"]
            result["check"] = {"own": own, "here": here}
        return result


def our_format(report: dict[str, Any]) -> str:
    """W4A8-FP8 and the like, with KV4 where keys and values are quantized too."""
    schemes = {
        figures["scheme"].split()[0]
        for layer in report["layers"]
        for figures in layer["linears"].values()
    }
    name = schemes.pop() if len(schemes) == 1 else "mixed" if schemes else "W16A16"
    cache = report["recipe"].get("kv_cache")
    return f"{name} KV{cache['bits']}" if cache else name


def benches(models: list[str], folder: Path, samples: int, outliers: bool) -> list[Bench]:
    found = []
    for model in models:
        generated = model.startswith("random-")
        path = generate(model, None, folder / model) if generated else find_model(model)
        name = short_name(model)
        found.append(Bench(name, path, _new(folder / name), samples))
        if generated or not outliers:
            continue
        checkpoint = Checkpoint(path)
        tensors = {n: checkpoint.load(n) for n in checkpoint.tensors}
        try:
            planted = plant_outliers(tensors, checkpoint.config)
        except (ValueError, KeyError, QuantkitError) as error:
            print(f"{model}: no outliers planted ({error})", file=sys.stderr)
            continue
        target = folder / f"{name}-outliers"
        shutil.copytree(path, target, ignore=shutil.ignore_patterns("*safetensors*"))
        save_tensors(planted, target / "model.safetensors")
        found.append(Bench(target.name, target, _new(folder / "work" / name), samples))
    return found


def _new(folder: Path) -> Path:
    path = folder.with_name(folder.name + "-work")
    path.mkdir(parents=True)
    return path


def keep(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the results; one of the same name, model and seed keeps what the new one does not say."""
    data = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    same = ("name", "model", "seed")
    old = [r for r in data["rows"] if all(r[key] == row[key] for key in same)]
    data["rows"] = [r for r in data["rows"] if r not in old] + [(old[0] if old else {}) | row]
    data["protocol"] = (
        f"gptq: windows of {SEQLEN} tokens of the held-out sample; calibration {SAMPLES} x {SEQLEN}"
    )
    data["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    data["machine"] = {"processor": processor(), "threads": torch.get_num_threads()}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(draft, path)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()


def table(path: Path) -> str:
    """Markdown: per format and way the loss on each model in percent, with seconds and memory on the first."""
    rows = json.loads(path.read_text())["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        ways = groups.setdefault((row["format"], row["name"]), {})
        ways.setdefault(row["model"], []).append(row)
    losses = " | ".join(f"loss %, {model}" for model in models)
    lines = [
        f"| format | method | {losses} | seconds | peak GB |",
        "|---" * (4 + len(models)) + "|",
    ]

    def order(item: Any) -> tuple[str, float]:
        (form, _), ways = item
        return form, next((_loss(ways[m])[0] for m in models if m in ways), 1e9)

    for (form, name), ways in sorted(groups.items(), key=order):
        cells = [_loss_cell(ways[m]) if m in ways else "" for m in models]
        first = [row for row in ways.get(models[0], []) if "seconds" in row]
        seconds = f"{min(row['seconds'] for row in first):.1f}" if first else ""
        peak = f"{min(row['peak_bytes'] for row in first) / 1e9:.2f}" if first else ""
        lines.append(f"| {form} | {name} | {' | '.join(cells)} | {seconds} | {peak} |")
    return "\n".join(lines)


def _loss(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Mean, least and most over the seeds, in percent."""
    found = [100 * (row["ratio"] - 1) for row in rows if "ratio" in row] or [float("nan")]
    return sum(found) / len(found), min(found), max(found)


def _loss_cell(rows: list[dict[str, Any]]) -> str:
    mean, least, most = _loss(rows)
    if len(rows) > 1:
        return f"{mean:.2f} ({least:.2f} to {most:.2f})"
    return f"{mean:.2f} ± {100 * rows[0].get('ratio_stderr', float('nan')):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["llama"], help="folders, hub ids or `llama`")
    parser.add_argument("--peers-python", action="append", default=[], metavar="PATH")
    parser.add_argument("--only", action="append", metavar="GLOB", help="of names in the table")
    parser.add_argument(
        "--set", action="append", default=[], help="of each of our recipes, as in quantize"
    )
    parser.add_argument("--seeds", default="0", help="of the calibration data, comma-separated")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="blocks of calibration data")
    parser.add_argument("--no-outliers", action="store_true", help="the models as they are alone")
    parser.add_argument("--seconds-only", action="store_true", help="do not measure accuracy")
    parser.add_argument("--accuracy-only", action="store_true", help="keep no time and no memory")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    args = parser.parse_args()
    if not args.table:
        patterns = args.only or ["*"]
        jobs = [
            job
            for job in peer_jobs(args.peers_python) + our_jobs(args.samples, args.set)
            if any(fnmatch.fnmatch(job.name, pattern) for pattern in patterns)
        ]
        with tempfile.TemporaryDirectory() as name:
            for bench in benches(args.models, Path(name), args.samples, not args.no_outliers):
                measure_all(bench, jobs, args)
    print(table(args.output))


def measure_all(bench: Bench, jobs: list[Job], args: argparse.Namespace) -> None:
    for job in jobs:
        for seed in map(int, args.seeds.split(",")):
            try:
                row = bench.measure(job, seed, seconds_only=args.seconds_only)
            except (RuntimeError, QuantkitError, OSError, ValueError, KeyError) as error:
                print(f"{bench.name}: {job.name} failed: {error}", file=sys.stderr, flush=True)
                continue
            seconds = row["seconds"]
            if args.accuracy_only:
                row = {key: value for key, value in row.items() if key not in COSTS}
            keep(args.output, row)
            loss = f"{100 * (row['ratio'] - 1):.3f} %" if "ratio" in row else ""
            print(f"{bench.name}: {job.name}: {loss} {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
