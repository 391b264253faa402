"""What a quantization will take: memory on the host and on the device, disk, and roughly how long.

The sums follow what `pipeline`, `step`, `plain` and `verify` hold at the same time; a test compares them with the peak that
the kernel saw.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit import memory
from quantkit.calibration.curvature import BLOCKS, TOKENS
from quantkit.errors import QuantkitError
from quantkit.formats.scheme import Scheme
from quantkit.models.files import ModelCheckpoint
from quantkit.models.groups import PLACES, LayerStructure
from quantkit.models.structure import Structure
from quantkit.recipe import Recipe

# Python with torch, transformers and what a run imports on the way; where the system does not say, the first alone.
_LIBRARIES = 420 << 20
_LATER_IMPORTS_PLAIN = 45 << 20
# With what the products' library keeps for itself: without and with AMX.
_LATER_IMPORTS = (80 << 20, 200 << 20)
# Kernels for every number of tokens that an expert sees, and holes in the heap between small weights; without and with.
_EXPERTS = (100 << 20, 300 << 20)
# Rounding passes hold this many bytes per number of a piece.
_ROUNDING = 32
_PIECE = 1 << 19
# Solves and searches per number of the linear they are at; refinement per number of the layer: target, offset, its
# gradient, Adam's two means, the best so far, the value that the forward pass keeps, the codes.
_SOLVING = 16
_REFINING = 7 * 4 + 1
_TOKENS_PER_BATCH = 2048
_HEAD_ROWS = 8192
_SANITY_TOKENS = 128
_SEARCH_ROWS = 1024
# Reading and writing, where nothing is computed.
_BYTES_PER_SECOND = 150e6


def _amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


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
    need: Estimate,
    offload: bool | None,
    device: torch.device,
    smaller: Callable[[int], str],
    processes: int = 1,
) -> bool:
    """Whether activations go to mapped files: as the user said, or where memory has no room for them.

    Args:
        smaller: what to do where so many bytes are all that a process may have.
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
    if least > room:
        _refuse(least, room, "of memory", smaller(room + here))
    if offload is False:
        _refuse(wanted, room, "of memory", "leave --no-offload out, or use fewer --samples")
        return False
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
    checkpoint: ModelCheckpoint,
    structure: Structure,
    recipe: Recipe,
    schemes: dict[str, Scheme],
    output_bytes: int,
    samples: int,
    seqlen: int,
) -> Estimate:
    """The estimate of a run; samples and seqlen matter for recipes that calibrate."""
    base = memory.resident() or _LIBRARIES
    base += _LATER_IMPORTS[_amx()] if recipe.needs_calibration else _LATER_IMPORTS_PLAIN
    width = _width(structure)
    # Verification: a packed layer while its largest linear is repacked; then a piece of the output layer and the logits.
    sizes = [_packed_bytes(structure, schemes, n) for n in range(structure.num_layers)]
    repacking = max(sum(layer) + 2 * max(layer) for layer in sizes)
    rows = max((i.shape[0] for i in checkpoint.tensors.values() if len(i.shape) == 2), default=0)
    verifying = max(repacking, _HEAD_ROWS * width * 2 + _SANITY_TOKENS * rows * 10)
    copying = 2 * (checkpoint.bytes + output_bytes) / _BYTES_PER_SECOND
    work = [
        _LayerWork(structure.layer(n), structure.prefix(n), recipe)
        for n in range(structure.num_layers)
    ]
    if not recipe.needs_calibration:
        moved = recipe.rotation and (recipe.rotation.residual or recipe.rotation.values)
        rounding = max(map(_LayerWork.quantizing, work)) if moved else _PIECE * _ROUNDING
        rounding += 2 * checkpoint.kept_bytes
        return Estimate(base + max(rounding, verifying), 0, 0, output_bytes, copying)
    tokens = samples * seqlen
    activations = tokens * width * 4 * (2 if recipe.refine else 1)
    batch = min(tokens, max(_TOKENS_PER_BATCH, seqlen))
    layer_work = max(
        max(each.running(batch), each.quantizing(), each.refining(seqlen)) for each in work
    )
    disk = output_bytes + 2 * activations
    if recipe.refine and recipe.refine.curvature:
        part = min(samples, BLOCKS) * seqlen * width * 4  # of each layer's outputs
        backwards = max(each.backwards(seqlen) for each in work)
        head = rows * width * 4 + max(rows * width * 2, 4 * TOKENS * rows * 4)
        layer_work = max(layer_work, 5 * part + max(head, backwards, 9 * width * width * 4))
        disk += structure.num_layers * (part + width * width * 4)
    return Estimate(
        host_bytes=base + max(activations + layer_work, verifying),
        device_bytes=layer_work + (300 << 20),
        activation_bytes=activations,
        disk_bytes=disk,
        seconds=_calibration_seconds(structure, tokens, seqlen)
        + copying
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


class _LayerWork:
    """What the stages of a decoder layer's work hold at the same time, in bytes.

    Attributes:
        weights: of the layer in float32.
    """

    def __init__(self, layer: LayerStructure, prefix: str, recipe: Recipe) -> None:
        numbers = [rows * columns for rows, columns in layer.shapes.values()]
        self._numbers, self._largest = sum(numbers), max(numbers)
        self.weights = 4 * self._numbers
        self._widest = max(max(shape) for shape in layer.shapes.values())
        self._ends = sum(rows + columns for rows, columns in layer.shapes.values())
        widths = [layer.shapes[group.linears[0]][1] for group in layer.groups]
        self._narrowest = min(widths)
        # Experts have Hessians of their own.
        self._solved = [
            layer.shapes[each.linears[0]][1]
            for each in layer.inputs
            if any(recipe.uses_gptq(prefix + name) for name in each.linears)
        ]
        statistics = sum(4 * width * width for width in self._solved)
        if recipe.needs_calibration:
            statistics += 4 * _SEARCH_ROWS * sum(widths)
        self._statistics = statistics + (_EXPERTS[_amx()] if len(layer.groups) > len(PLACES) else 0)
        self._refines = recipe.refine is not None

    def running(self, batch: int) -> int:
        """A batch of tokens runs through it, its inputs are looked at."""
        # The batch's hidden states a few times, the gated products, one block of attention scores.
        return (
            self.weights + self._statistics + batch * 4 * (4 * self._narrowest + 4 * self._widest)
        )

    def quantizing(self) -> int:
        """One linear after the other is solved; what comes of them is kept, targets too where they are refined."""
        columns = max(self._solved, default=0)
        # The Hessian changed to the new basis, then its factor, some rows at a time.
        solving = 4 * columns * (2 * columns + 4 * 512) + _SOLVING * self._largest
        kept = self._numbers * (5 if self._refines else 1)
        return self.weights + self._statistics + kept + solving

    def refining(self, seqlen: int) -> int:
        """Everything learns, a block of tokens at a time."""
        if not self._refines:
            return 0
        return _REFINING * self._numbers + _SOLVING * self._largest + self._for_gradients(seqlen)

    def backwards(self, seqlen: int) -> int:
        """A gradient comes back through it as it was."""
        return self.weights + self._for_gradients(seqlen)

    def _for_gradients(self, seqlen: int) -> int:
        """What one block's forward pass keeps."""
        return 4 * seqlen * self._ends


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
