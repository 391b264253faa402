"""One decoder layer of a run, from its weights in the source to the next layer's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from quantkit.calibration.observe import Watched, observe
from quantkit.calibration.stream import LayerStream
from quantkit.device import product_dtype
from quantkit.errors import QuantkitError
from quantkit.formats.packed import packed_tensors
from quantkit.formats.writer import OutputFolder
from quantkit.layer import QuantizedLayer, quantize_layer
from quantkit.models.groups import LayerStructure
from quantkit.plain import copy_tensor
from quantkit.plan import Plan
from quantkit.ranks import Ranks
from quantkit.refinement import Task, refine_layer
from quantkit.resume import RunState

# Tokens of each linear's input that are kept for the search of channel factors.
_SEARCH_ROWS = 1024
# Blocks on which a quantized layer's output is compared with the original layer's.
_ERROR_BLOCKS = 4


def run_layer(
    plan: Plan,
    stream: LayerStream,
    number: int,
    folder: OutputFolder | None,
    state: RunState,
    curvature: torch.Tensor | None,
    ranks: Ranks,
) -> QuantizedLayer:
    """Calibrate, transform, quantize and write one decoder layer; the stream moves on to its outputs."""
    prefix = plan.structure.prefix(number)
    structure = plan.structure.layer(number)
    norm_dtype = _norm_dtype(plan, prefix, structure)
    with stream.layer(number) as layer:
        reference, seen = _Reference(_ERROR_BLOCKS - stream.first, ranks), None
        if stream.hidden is not None:
            with state.stage("calibrate"), _at(number):
                seen = _calibrate(plan, stream, layer, number, reference, ranks)
            if stream.hidden_reference is not None:
                stream.advance_reference(layer, number)
        with state.stage("quantize"):
            result = quantize_layer(
                layer,
                prefix,
                plan.recipe,
                plan.schemes,
                structure,
                seen.inputs if seen else {},
                seen.keys if seen else None,
                norm_dtype=norm_dtype,
                ranks=ranks,
            )
        seen = None  # the Hessians of wide layers are as large as they are
        if stream.hidden is not None:
            _quantize_cache(plan, layer.get_submodule(structure.attention.path), result)
        if plan.recipe.refine:
            with state.stage("refine"):
                _refine(plan, stream, number, layer, result, norm_dtype, curvature, ranks)
        if folder:
            with state.stage("write"):
                _write_layer(plan, prefix, layer, result, folder)
        if stream.hidden is not None:
            before = stream.hidden[: reference.blocks].clone()
            # Behind the last layer nothing reads them but the comparison below.
            last = number == plan.structure.num_layers - 1
            with state.stage("advance"):
                stream.advance(layer, number, reference.blocks if last else None)
            result.report["output_error"] = reference.error(before, stream.hidden)
    return result


def narrow_products(plan: Plan, device: torch.device) -> torch.dtype:
    """The type of products that only calibrate: narrow where the model's own will be, and its weights hide it."""
    stored = plan.checkpoint.tensors.values()
    sixteen = sum(info.bytes for info in stored if info.dtype in ("BF16", "F16"))
    if 2 * sixteen <= plan.checkpoint.bytes:
        return torch.float32
    return product_dtype(device, min((s.weights.bits for s in plan.schemes.values()), default=16))


def _calibrate(
    plan: Plan,
    stream: LayerStream,
    layer: torch.nn.Module,
    number: int,
    reference: _Reference,
    ranks: Ranks,
) -> Watched:
    """What the stream's samples show in a layer as the original is; `reference` keeps its first outputs."""
    prefix, structure = plan.structure.prefix(number), plan.structure.layer(number)
    gptq = {
        group.name for group in structure.inputs
        if any(plan.recipe.uses_gptq(prefix + name) for name in group.linears)
    }  # fmt: skip
    with observe(
        layer,
        structure,
        hessians=gptq,
        keep_rows=_SEARCH_ROWS,
        batches=stream.batches,
        products=stream.products,
        ranks=ranks,
    ) as seen:
        stream.run(layer, number, reference.keep, watched=seen, outputs=reference.blocks)
    return seen


def _norm_dtype(plan: Plan, prefix: str, structure: LayerStructure) -> torch.dtype:
    """The type in which the norms that take factors are stored."""
    norms = [g.feeder.module for g in structure.groups if g.feeder is not None and g.feeder.norm]
    if not norms:
        return torch.float32
    return plan.checkpoint.load(f"{prefix}{norms[0]}.weight").dtype


@contextmanager
def _at(number: int) -> Iterator[None]:
    """Bad input that shows in a layer is said with its number."""
    try:
        yield
    except QuantkitError as error:
        error.args = (f"layer {number}: {error}",)
        raise


class _Reference:
    """Keeps the original layer's outputs for this process's share of the first few blocks."""

    def __init__(self, blocks: int, ranks: Ranks) -> None:
        self.blocks = max(blocks, 0)
        self._ranks = ranks
        self._kept: list[torch.Tensor] = []

    def keep(self, first: int, output: torch.Tensor) -> None:
        if first < self.blocks:
            self._kept.append(output[: self.blocks - first].cpu())

    def error(self, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
        """Squared error of the outputs over the square of what the original layer adds to its input."""
        want = torch.cat(self._kept) if self._kept else inputs[:0]
        error = (outputs[: want.shape[0]] - want).square().sum()
        sums = torch.stack([error, (want - inputs[: want.shape[0]]).square().sum()])
        self._ranks.total(sums)
        return float(sums[0] / sums[1].clamp_min(1e-30))


def _refine(
    plan: Plan,
    stream: LayerStream,
    number: int,
    layer: torch.nn.Module,
    result: QuantizedLayer,
    norm_dtype: torch.dtype,
    curvature: torch.Tensor | None,
    ranks: Ranks,
) -> None:
    """Let a quantized layer learn from what the original model has at its output."""
    assert plan.recipe.refine
    assert stream.hidden is not None
    assert stream.hidden_reference is not None
    prefix, structure = plan.structure.prefix(number), plan.structure.layer(number)
    schemes = {name: plan.schemes[prefix + name] for name in result.weights}
    feeders = [group.feeder for group in structure.groups if group.feeder is not None]
    result.weights, result.report["refinement"] = refine_layer(
        layer,
        result.weights,
        schemes,
        tuple(f.module for f in feeders if f.norm and not f.offset),
        norm_dtype,
        Task(
            lambda hidden: stream.forward(layer, number, hidden),
            stream.hidden,
            stream.hidden_reference,
            curvature,
            narrow_products(plan, stream.device),
            stream.first,
            ranks,
        ),
        plan.recipe.refine,
    )


def _quantize_cache(plan: Plan, attention: Any, result: QuantizedLayer) -> None:
    """From here on the layer's attention rounds keys and values as the served model will."""
    from quantkit.runtime.attention import KVQuantizer

    form = plan.recipe.kv_format()
    if form:
        attention.kv_quantizer = KVQuantizer(form, result.post_scale)


def _write_layer(
    plan: Plan, prefix: str, layer: torch.nn.Module, result: QuantizedLayer, folder: OutputFolder
) -> None:
    parameters = dict(layer.named_parameters())
    for name in [n for n in plan.checkpoint.tensors if n.startswith(prefix)]:
        local = name.removeprefix(prefix)
        module, _, kind = local.rpartition(".")
        if module in result.weights and kind == "weight":
            solved = result.weights[module]
            for suffix, tensor in packed_tensors(
                solved.codes.cpu(), solved.scale.cpu(), plan.schemes[prefix + module]
            ).items():
                folder.add(f"{prefix}{module}.{suffix}", tensor)
        elif local in parameters:
            # Norms and biases may have taken a factor in; those that did not round back to the same bytes.
            original = plan.checkpoint.read(name)
            folder.add(name, parameters[local].detach().to("cpu", original.dtype))
        else:
            copy_tensor(plan.checkpoint, name, folder)
