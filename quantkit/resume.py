"""What makes two runs the same, and the state from which a killed one goes on.

An output is a function of what `describe_run` lists. A run's state is applied to no other run: `OutputFolder.begin`
compares the descriptions and says what differs.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.calibration.activations import Activations
from quantkit.calibration.data import CalibrationSet
from quantkit.device import product_dtype
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint, read_json
from quantkit.formats.writer import UNFINISHED, OutputFolder, difference, writing
from quantkit.kernels.cpu import native
from quantkit.plan import Plan
from quantkit.ranks import Ranks

# Of the state's form and meaning.
_VERSION = 5


def describe_run(
    plan: Plan, data: CalibrationSet | None, seed: int, device: torch.device
) -> dict[str, Any]:
    """All that decides the output's bytes, as plain data; but for how many processes add sums up."""
    import transformers

    return {
        "state": _VERSION,
        "quantkit": quantkit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": describe_model(plan.checkpoint),
        "recipe": plan.recipe.model_dump(),
        "calibration": data.to_dict() if data else None,
        "seed": seed,
        "device": device.type,
        # Processors that multiply bfloat16 by themselves use it for products that are not kept, and our own loops add up
        # in another order than torch's.
        "products": str(product_dtype(device, 4)).removeprefix("torch."),
        "native": native.level() if device.type == "cpu" else None,
    }


def check_alike(run: dict[str, Any], ranks: Ranks) -> None:
    """All processes must be about the same run.

    Raises:
        QuantkitError: one has another model, recipe, text or version before it.
    """
    # Copies of a model on several machines have times of their own.
    files = {name: text.rpartition(" ")[0] or text for name, text in run["model"].items()}
    first, *others = ranks.everyones(run | {"model": files})
    for rank, other in enumerate(others, 1):
        if other != first:
            raise QuantkitError(
                f"process {rank} is about another run than the first ({difference(first, other)}); "
                "all need the same model, text and versions"
            )


def digest(run: dict[str, Any]) -> str:
    """What tells a run from others, in short."""
    return hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest()


def finished_report(path: Path) -> dict[str, Any] | None:
    """The report of a finished output, or None."""
    if not (path / "config.json").is_file() or (path / UNFINISHED).exists():
        return None
    try:
        return read_json(path / "quantkit" / "report.json")
    except QuantkitError:
        return None


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which checkpoint it is, without reading its weights: config, headers, sizes and times of the files."""
    config = json.dumps(checkpoint.config, sort_keys=True).encode()
    return {"config": hashlib.sha256(config).hexdigest()[:16]} | {
        file: _describe_file(checkpoint.path / file) for file in checkpoint.files
    }


def _describe_file(path: Path) -> str:
    status = path.stat()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = hashlib.sha256(file.read(length)).hexdigest()[:16]
    return f"{header} {status.st_size} {status.st_mtime_ns}"


class RunState:
    """How far a run is; the live chain of activations with it.

    Args:
        folder: where it is kept; None in processes that do not write.
        kept: what an earlier start of the run has saved.

    Attributes:
        done: decoder layers that are finished.
        curvature: whether every layer's is known and kept beside the state; None before it was measured.
        copied: whether the tensors outside the layers are written too.
        layers: the layers' reports.
        scales: layer -> factor on keys after RoPE.
        seconds: stage -> seconds spent in it, over all starts of the run.
    """

    def __init__(self, folder: OutputFolder | None, kept: dict[str, Any] | None) -> None:
        self._folder = folder
        self._started = time.monotonic()
        kept = kept or {}
        self.done: int = kept.get("done", 0)
        self.curvature: bool | None = kept.get("curvature")
        self.copied: bool = kept.get("copied", False)
        self.layers: list[dict[str, Any]] = kept.get("layers", [])
        self.scales = {n: torch.tensor(values) for n, values in kept.get("scales", {}).items()}
        self.seconds: dict[str, float] = kept.get("seconds", {})
        self._before: float = kept.get("elapsed", 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began, without those between its starts."""
        return self._before + time.monotonic() - self._started

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time spent here is added to the stage's seconds."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def save(self, chains: dict[str, torch.Tensor], store: Activations) -> None:
        """Everything up to here is safe: a new start of the same run begins behind it."""
        names = {f"{self.done}-{chain}": tensor for chain, tensor in chains.items()}
        with self.stage("save"):
            with writing(self._folder.work) if self._folder else nullcontext():
                for name, tensor in names.items():
                    store.save(name, tensor)
            if self._folder is None:
                return
            self._folder.save(
                {
                    "done": self.done,
                    "curvature": self.curvature,
                    "copied": self.copied,
                    "layers": self.layers,
                    "scales": {name: tensor.tolist() for name, tensor in self.scales.items()},
                    "seconds": self.seconds,
                    "elapsed": self.elapsed,
                }
            )
            store.keep_only(set(names))
