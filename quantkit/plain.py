"""Rounding to nearest without calibration: tensor by tensor, some rows at a time, so that memory does not grow
with the model."""

from __future__ import annotations

from typing import Any

import torch

from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.packed import expected_tensors, packed_tensors
from quantkit.formats.scheme import Scheme
from quantkit.formats.writer import OutputFolder
from quantkit.methods import rounding
from quantkit.methods.hadamard import rotate
from quantkit.plan import Plan
from quantkit.recipe import Weights
from quantkit.solve import size_figures, weight_scale

# Numbers rounded at a time: enough for every core, few enough for the passes over them to stay in the cache, and for
# malloc to use the same memory again (`memory.keep_bounded`).
ELEMENTS = 1 << 19


def rounds_plainly(plan: Plan) -> bool:
    """Whether each linear is rounded on its own: nothing is learned, and nothing is moved between weights."""
    tensors = plan.checkpoint.tensors
    rotation = plan.recipe.rotation
    moved = rotation is not None and (rotation.residual or rotation.values)
    return not (plan.recipe.needs_calibration or moved) and all(
        f"{name}.weight" in tensors and len(tensors[f"{name}.weight"].shape) == 2
        for name in plan.schemes
    )


def round_layer(plan: Plan, prefix: str, folder: OutputFolder) -> dict[str, Any]:
    """Write one decoder layer, its linears rounded to nearest; gives the layer's report."""
    report: dict[str, Any] = {"linears": {}, "factors": {}, "zero_fraction": {}}
    for name in [n for n in plan.checkpoint.tensors if n.startswith(prefix)]:
        module, _, kind = name.rpartition(".")
        scheme = plan.schemes.get(module)
        if scheme is not None and kind == "weight":
            weights = plan.recipe.weights_of(module)
            assert weights
            figures = _round(plan.checkpoint, module, scheme, weights, folder)
            report["linears"][module.removeprefix(prefix)] = figures
        else:
            copy_tensor(plan.checkpoint, name, folder)
    return report


def copy_tensor(checkpoint: Checkpoint, name: str, folder: OutputFolder) -> None:
    """A tensor as it is, in pieces; refused if it holds NaN or infinity."""
    info = checkpoint.tensors[name]
    with folder.tensor(name, info.dtype, info.shape) as pieces:
        for piece in checkpoint.pieces(name):
            pieces.write(piece)


@torch.no_grad()
def _round(
    checkpoint: Checkpoint, module: str, scheme: Scheme, weights: Weights, folder: OutputFolder
) -> dict[str, Any]:
    rows, columns = checkpoint.tensors[f"{module}.weight"].shape
    # FireQ's scale for the whole tensor is not known before all of it is.
    step = rows if scheme.weights.scale == "fp8_tensor" else max(1, ELEMENTS // columns)
    grid = rounding.Grid(scheme.weights.bits, scheme.weights.half)
    (large, form), *_ = expected_tensors(scheme, rows, columns).items()
    rest: dict[str, list[torch.Tensor]] = {}
    lost = total = 0.0
    with folder.tensor(f"{module}.{large}", *form) as pieces:
        for first in range(0, rows, step):
            span = (first, min(first + step, rows))
            weight = checkpoint.read(f"{module}.weight", rows=span, finite=True).float()
            if scheme.rotation:
                weight = rotate(weight, scheme.rotation)
            scale = weight_scale(weight, scheme.weights, weights.clip, None)
            codes, missed, square = rounding.quantize_measured(weight, scale, grid)
            packed = packed_tensors(codes, scale, scheme)
            pieces.write(packed.pop(large))
            for suffix, tensor in packed.items():
                rest.setdefault(suffix, []).append(tensor)
            lost, total = lost + missed, total + square
    for suffix, tensors in rest.items():
        whole = torch.tensor([rows, columns]) if suffix == "weight_shape" else torch.cat(tensors)
        folder.add(f"{module}.{suffix}", whole)
    error = lost / max(total, 1e-30)
    figures = {"scheme": str(scheme), "rounding": weights.rounding, "weight_error": error}
    return figures | size_figures(scheme, rows, columns)
