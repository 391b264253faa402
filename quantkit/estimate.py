"""What a quantization will take: memory on the host and on the device, disk, and roughly how long.

The sums follow what `pipeline`, `plain` and `verify` hold at the same time; a test compares them with the peak that
the kernel saw.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import memory
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.scheme import Scheme
from quantkit.models.groups import LayerStructure
from quantkit.models.structure import Structure
from quantkit.recipe import Recipe

# Python with torch, transformers and what a run imports on the way; where the system does not say, the first alone.
_LIBRARIES = 420 << 20
_LATER_IMPORTS = 110 << 20
_LATER_IMPORTS_PLAIN = 45 << 20
# Rounding passes hold this many bytes per number of a piece.
_ROUNDING = 32
_PIECE = 1 << 19
_TOKENS_PER_BATCH = 2048
_HEAD_ROWS = 8192
_SANITY_TOKENS = 128
_SEARCH_ROWS = 1024
# Reading and writing, where nothing is computed.
_BYTES_PER_SECOND = 150e6


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds.

    Attributes:
        host_bytes: peak memory of the process.
        device_bytes: peak memory on a GPU, if layers run on one; what the process holds is then less.
        activation_bytes: the part of it that is activations between layers, which can be on disk instead.
        disk_bytes: free space needed in the output's folder.
        seconds: a rough time on this machine.
    """

    host_bytes: int
    device_bytes: int
    activation_bytes: int
    disk_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_offload(
    need: Estimate, offload: bool | None, device: torch.device, processes: int = 1
) -> bool:
    """Whether activations go to mapped files: as the user said, or where memory has no room for them.

    Args:
        processes: how many share this machine's memory, each in need of as much.

    Raises:
        QuantkitError: it does not fit either way, or not the way the user wants.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        _refuse(need.device_bytes, free, f"on {device}", "use --device cpu")
    room = memory.available()
    if room is None:
        return bool(offload)
    room //= processes
    here = memory.resident()
    wanted = max(0, need.host_bytes - here)
    least = max(0, wanted - need.activation_bytes)
    smaller = "close other programs, or use a machine with more"
    if offload is False:
        _refuse(wanted, room, "of memory", "leave --no-offload out, or use fewer --samples")
        return False
    _refuse(least, room, "of memory", smaller)
    return bool(offload) or wanted > room


def check_disk(path: Path, need: int) -> None:
    """Refuse what the disk has no room for.

    Raises:
        QuantkitError: fewer than `need` bytes are free where `path` is.
    """
    free = shutil.disk_usage(path).free
    _refuse(need, free, f"of disk at {path}", "free space, or choose another folder with -o")


def _refuse(need: int, free: int, of_what: str, advice: str) -> None:
    if need > free:
        raise QuantkitError(
            f"{need / 1e9:.2f} GB {of_what} are needed, {free / 1e9:.2f} GB are free; {advice}"
        )


def estimate(
    checkpoint: Checkpoint,
    structure: Structure,
    recipe: Recipe,
    schemes: dict[str, Scheme],
    output_bytes: int,
    samples: int,
    seqlen: int,
) -> Estimate:
    """The estimate of a run; samples and seqlen matter for recipes that calibrate."""
    base = memory.resident() or _LIBRARIES
    base += _LATER_IMPORTS if recipe.needs_calibration else _LATER_IMPORTS_PLAIN
    width = _width(structure)
    # Verification: a packed layer while its largest linear is repacked; then a piece of the output layer and the logits.
    sizes = [_packed_bytes(structure, schemes, n) for n in range(structure.num_layers)]
    repacking = max(sum(layer) + 2 * max(layer) for layer in sizes)
    rows = max((i.shape[0] for i in checkpoint.tensors.values() if len(i.shape) == 2), default=0)
    verifying = max(repacking, _HEAD_ROWS * width * 2 + _SANITY_TOKENS * rows * 10)
    if not recipe.needs_calibration:
        work = _PIECE * _ROUNDING
        seconds = 2 * (checkpoint.bytes + output_bytes) / _BYTES_PER_SECOND
        return Estimate(base + max(work, verifying), 0, 0, output_bytes, seconds)
    tokens = samples * seqlen
    chains = 2 if getattr(recipe, "refine", None) else 1
    activations = tokens * width * 4 * chains
    layer_work = max(
        _calibrating(structure.layer(n), min(tokens, max(_TOKENS_PER_BATCH, seqlen)), seqlen)
        for n in range(structure.num_layers)
    )
    return Estimate(
        host_bytes=base + max(activations + layer_work, verifying),
        device_bytes=layer_work + (300 << 20),
        activation_bytes=activations,
        disk_bytes=output_bytes + 2 * activations,
        seconds=_calibration_seconds(structure, tokens, seqlen)
        + 2 * (checkpoint.bytes + output_bytes) / _BYTES_PER_SECOND
        + structure.num_layers * activations / _BYTES_PER_SECOND,
    )


def _width(structure: Structure) -> int:
    """Of the activations between layers."""
    first = structure.layer(0)
    return first.shapes[first.groups[0].linears[0]][1]


def _packed_bytes(structure: Structure, schemes: dict[str, Scheme], number: int) -> list[int]:
    """Of each linear of a layer, as it is stored."""
    prefix = structure.prefix(number)
    return [
        schemes[prefix + name].packed_bytes(*shape) if prefix + name in schemes else 2 * shape[0] * shape[1]
        for name, shape in structure.layer(number).shapes.items()
    ]  # fmt: skip


def _calibrating(layer: LayerStructure, batch: int, seqlen: int) -> int:
    """A layer in float32 with its Hessians, and the most of: a batch running through it, a weight being solved."""
    numbers = {name: rows * columns for name, (rows, columns) in layer.shapes.items()}
    widths = [layer.shapes[group.linears[0]][1] for group in layer.groups]
    hessians = sum(width * width * 4 for width in widths)
    wide = max(max(shape) for shape in layer.shapes.values())
    # The batch's hidden states a few times, the gated products, one block of attention scores.
    running = batch * (4 * min(widths) + 4 * wide) * 4
    columns = max(widths)
    # The Hessian changed to the new basis, then its factor, some rows at a time; the weight transposed, its codes and
    # errors.
    solving = columns * (columns * (4 + 4) + 4 * 512 * 4) + max(numbers.values()) * 4 * 4
    kept = _SEARCH_ROWS * sum(widths) * 4
    return sum(numbers.values()) * 5 + hessians + kept + max(running, solving)


def _calibration_seconds(structure: Structure, tokens: int, seqlen: int) -> float:
    """Forward passes (as the original, as quantized), Hessians and solves at this machine's speed."""
    work = 0.0
    for number in range(structure.num_layers):
        layer = structure.layer(number)
        for rows, columns in layer.shapes.values():
            work += 2 * 2 * rows * columns * tokens + 2 * rows * columns * columns
        for group in layer.groups:
            columns = layer.shapes[group.linears[0]][1]
            work += 2 * columns * columns * tokens + 2 * 8 * columns**3 / 3
    return work / _flops()


def _flops() -> float:
    """Multiply-adds (two each) a second of a float32 product here."""
    a, best = torch.ones(768, 768), float("inf")
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return float(2 * 768**3 / best)
