"""What every peer's script does around its own quantization. Runs in the peer's environment, without quantkit.

A script writes a folder that benchmarks/accuracy.py measures: an ordinary checkpoint in float32 whose linears
hold the dequantized weights, and peer.json with how activations are rounded, seconds and versions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Activations rounded to the format per token: x is divided by max|row| / levels.
INT8_TOKEN = {"type": "int", "grain": "token", "levels": 127.5}
INT8_TOKEN_ASYMMETRIC = {"type": "int", "grain": "token", "asymmetric": True}
FP8_TOKEN = {"type": "float", "grain": "token", "levels": 448.0}


@dataclass
class Result:
    """What a peer made.

    Attributes:
        weights: linear's name -> dequantized weight, float32 [N, K].
        activations: how inputs of these linears are rounded, or None.
        model: the model afterwards, for what else changed in it (norms).
    """

    model: Any
    weights: dict[str, torch.Tensor]
    activations: dict[str, Any] | None = None
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds of a peer's own work: imports, loading and our saving are not counted."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Any:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def load(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(source), dtype="auto").eval()


def tokenizer(source: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(source))


def linears(model: Any) -> dict[str, Any]:
    """The linears of the decoder layers: the output layer stays as it is everywhere."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers." in name
    }


def main(
    packages: list[str],
    variants: list[str],
    quantize: Callable[[str, Path, torch.Tensor, int, Clock], Result],
) -> None:
    """Command line of a peer's script.

    Args:
        packages: whose versions are recorded, the peer itself first.
        variants: the names that `--variant` takes.
        quantize: (variant, source, blocks [samples, seqlen], seed, clock) -> Result.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("blocks", type=Path, help="safetensors with int64 `tokens`")
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", choices=variants, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    blocks, clock = load_file(args.blocks)["tokens"], Clock()
    result = quantize(args.variant, args.source, blocks, args.seed, clock)
    with torch.no_grad():
        logits = result.model(blocks[:1], use_cache=False).logits[0, :-1].float()
    save(args.out, args.source, result)
    description = {
        "activations": result.activations,
        "linears": sorted(result.weights),
        "seconds": clock.seconds,
        # Of the peer's own model on the first block: the measurer must find the same in what was saved.
        "check_loss": float(torch.nn.functional.cross_entropy(logits, blocks[0, 1:])),
        "versions": {name: version(name) for name in [*packages, "torch", "transformers"]},
        "python": sys.version.split()[0],
    }
    (args.out / "peer.json").write_text(json.dumps(description | result.notes, indent=2))


def save(out: Path, source: Path, result: Result) -> None:
    """The source's tensors with what the peer made of them, in float32."""
    out.mkdir(parents=True, exist_ok=True)
    state = result.model.state_dict()
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, original in load_file(file).items():
            module = name.removesuffix(".weight")
            if module in result.weights:
                tensor = result.weights[module]
            else:
                tensor = state.get(name, original)
            if tensor.shape != original.shape:
                raise SystemExit(f"{name}: {list(tensor.shape)}, {list(original.shape)} expected")
            tensors[name] = tensor.detach().float().contiguous().clone()
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for file in source.iterdir():
        side = file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name
        if side and not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
