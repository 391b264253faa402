"""The main job: plan -> per layer (calibrate -> transform -> quantize -> write) -> verify -> report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from quantkit import memory
from quantkit.allocation.allocate import (
    SAMPLES,
    allocate,
    check_target,
    find_target,
    widths_for,
)
from quantkit.calibration.activations import Activations
from quantkit.calibration.curvature import output_curvature, read_root
from quantkit.calibration.data import CalibrationSet, calibration_blocks
from quantkit.calibration.sources import check_sources, named_samples
from quantkit.calibration.stream import LayerStream, observe
from quantkit.device import find_device, product_dtype
from quantkit.errors import QuantkitError
from quantkit.estimate import check_disk, choose_offload
from quantkit.finish import RECIPE_FILE, Progress, complete, summary
from quantkit.formats.packed import packed_tensors
from quantkit.formats.writer import OutputFolder, clear_up, writing
from quantkit.layer import QuantizedLayer, quantize_layer
from quantkit.models.groups import LayerStructure
from quantkit.models.tokenizer import load_tokenizer
from quantkit.plain import copy_tensor, round_layer, rounds_plainly
from quantkit.plan import Plan, default_output, make_plan
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import Recipe
from quantkit.refinement import Task, refine_layer
from quantkit.resume import RunState, check_alike, describe_run, digest, finished_report

# Tokens of each linear's input that are kept for the search of channel factors.
_SEARCH_ROWS = 512
# Blocks on which a quantized layer's output is compared with the original layer's.
_ERROR_BLOCKS = 4


def quantize(
    model: str,
    recipe: str | Recipe,
    output: str | Path | None = None,
    *,
    calib: str | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    device: str = "cpu",
    overrides: list[str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    target_bits: float | None = None,
    target_size: str | int | None = None,
    widths: list[int] | None = None,
    offload: bool | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Quantize a checkpoint into a folder that quantkit, and where the scheme allows transformers, vLLM and SGLang, load.

    Args:
        model: a folder, a hub id, or `llama`, the bundled model.
        recipe: a name, the path of a YAML file, or a Recipe.
        output: where to; `./<model>-<recipe>` if left out.
        calib: the calibration data: `bundled`, `wikitext`, `c4`, `pile-val`, `ultrachat`, a text, .jsonl, .json or
            .parquet file, or a mixture `NAME:64,NAME:64`; the recipe's if left out.
        samples, seqlen: calibration blocks and their tokens; the mixture's or the recipe's if left out.
        device: where layers are run and solved, `cpu` or `cuda`.
        overrides: `path=value` changes of the recipe (not with a Recipe object).
        seed: of the choice of calibration blocks.
        overwrite: replace a finished output of ours, or another run's unfinished one.
        target_bits: give each part of the model the width that costs least, so that the quantized linears take at
            most so many bits per weight, scales included; the rules found lie in quantkit/recipe.yaml.
        target_size: the same for the bytes of the whole checkpoint: a number, or as `3GB`.
        widths: the bits to choose from; all that there are if left out.
        offload: keep activations in files; left out: where memory has no room for them.
        trust_remote_code: run Python code that comes with the checkpoint, where its model type needs it.
        progress: called with (layers done, layers, what is being done).
        ranks: the processes that do it together, from `quantkit.ranks.joined`; each calls this with the same
            arguments.

    Returns:
        The report that is also written to quantkit/report.json. A run that was killed goes on where it was; one
        that is finished already is left as it is (`unchanged`).

    Raises:
        QuantkitError: bad input, named in one line; nothing is left behind that looks finished.
        InternalError: the output did not verify.
    """
    memory.keep_bounded()
    if isinstance(recipe, str):
        recipe = Recipe.load(recipe, overrides)
    if calib is None:
        calib = recipe.calibration.source
    elif samples is None:
        samples = named_samples(calib)
    check_sources(calib)
    where = ranks.device(find_device(device))
    for name, value in (("samples", samples), ("seqlen", seqlen)):
        if value is not None and value < (1 if name == "samples" else 2):
            raise QuantkitError(
                f"--{name} {value}: at least {1 if name == 'samples' else 2} is needed"
            )
    plan = make_plan(
        model, recipe, samples=samples, seqlen=seqlen, trust_remote_code=trust_remote_code
    )
    if seqlen is not None and seqlen > plan.structure.max_positions:
        raise QuantkitError(
            f"--seqlen {seqlen}: the model was made for at most {plan.structure.max_positions} tokens"
        )
    tell = progress or (lambda done, total, what: None)
    allocation = None
    target = find_target(target_bits, target_size)
    if target is not None:
        choice = widths_for(recipe, widths)
        check_target(plan, target, choice)
        few = min(SAMPLES, samples or recipe.calibration.samples)
        text = _calibration(plan, calib, few, seqlen, seed, trust_remote_code)
        recipe, allocation = allocate(plan, target, text, choice, where, tell, ranks)
        # Measuring has used the skeleton up.
        plan = make_plan(
            model, recipe, samples=samples, seqlen=seqlen, trust_remote_code=trust_remote_code
        )
    on_disk = choose_offload(plan.estimate, offload, where, plan.smaller, ranks.on_this_machine)
    path = Path(output) if output is not None else default_output(model, recipe)

    def calibration() -> CalibrationSet | None:
        if not recipe.needs_calibration:
            return None
        return _calibration(plan, calib, samples, seqlen, seed, trust_remote_code)

    def unchanged() -> dict[str, Any] | None:
        clear_up(path)
        earlier = None if overwrite else finished_report(path)
        if earlier is None:
            return None
        run = describe_run(plan, calibration(), seed, where)
        same = earlier.get("run") == digest(run)
        return earlier | {"output": str(path), "unchanged": True} if same else None

    there: dict[str, Any] | None = ranks.leaders(unchanged() if ranks.leads else None)
    if there is not None:
        return there
    with _output_folder(plan, path, overwrite) if ranks.leads else nullcontext() as folder:
        activations = plan.estimate.activation_bytes if on_disk else 0
        if folder:
            check_disk(path, plan.estimate.disk_bytes + activations)
        else:
            check_disk(Path(tempfile.gettempdir()), activations // ranks.size)
        data = calibration()
        run = describe_run(plan, data, seed, where)
        check_alike(run, ranks)
        state = RunState(folder, ranks.leaders(folder.begin(run) if folder else None))
        _quantize_layers(plan, data, where, seed, folder, state, on_disk, tell, ranks)
        report: dict[str, Any] = {}
        if folder:
            with ranks.leader_works():
                more = summary(model, plan, data, seed) | {"run": digest(run)}
                if allocation is not None:
                    more["allocation"] = allocation | {"recipe_file": RECIPE_FILE}
                report = complete(plan, data, folder, state, more, trust_remote_code, tell)
        report = ranks.leaders(report)
    return report | {"output": str(path)}


def _output_folder(plan: Plan, path: Path, overwrite: bool) -> OutputFolder:
    folder = OutputFolder(path, overwrite=overwrite, tensors=3 * len(plan.checkpoint.tensors))
    folder.file_name = plan.checkpoint.file_name
    return folder


def _quantize_layers(
    plan: Plan,
    data: CalibrationSet | None,
    device: torch.device,
    seed: int,
    folder: OutputFolder | None,
    state: RunState,
    offload: bool,
    tell: Progress,
    ranks: Ranks,
) -> None:
    """All decoder layers that are not finished yet."""
    plainly = rounds_plainly(plan)
    if state.done == plan.structure.num_layers:
        return
    if plainly:
        # As fast as the disk: one process is enough.
        if folder:
            with ranks.leader_works():
                _round_layers(plan, folder, state, tell)
        return
    store = Activations(
        folder.work if folder else Path(tempfile.gettempdir()), offload=offload, ranks=ranks
    )
    with state.stage("embed"):
        stream = LayerStream(
            plan.checkpoint,
            plan.skeleton,
            plan.structure,
            data.tokens if data else None,
            device,
            reference=plan.recipe.refine is not None,
            store=store,
            done=state.done,
            basis=plan.basis,
            ranks=ranks,
            products=_products(plan, device),
        )
    measured = _measure_curvature(plan, data, device, folder, state, store, ranks)
    for number in _unfinished(plan, state, tell):
        # Whatever is drawn at random is a function of seed and layer, also in a run that was gone on with.
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + number)
            root = _curvature_of(number, stream, folder, ranks) if measured else None
            result = _one_layer(plan, stream, number, folder, state, root, ranks)
        state.layers.append(result.report)
        if result.post_scale is not None:
            state.scales[str(number)] = result.post_scale.cpu()
        if folder:
            folder.end_of_layer()
        state.done = number + 1
        state.save(stream.chains(), store)


def _measure_curvature(
    plan: Plan,
    data: CalibrationSet | None,
    device: torch.device,
    folder: OutputFolder | None,
    state: RunState,
    store: Activations,
    ranks: Ranks,
) -> bool:
    """Whether every layer's curvature lies beside the output; measured once in a run, by the first process."""
    if not (plan.recipe.refine and plan.recipe.refine.curvature and data):
        return False
    if folder and state.curvature is None:
        with state.stage("curvature"), ranks.leader_works(), writing(folder.work):
            state.curvature = output_curvature(
                plan.checkpoint,
                plan.skeleton,
                plan.structure,
                data.tokens,
                device,
                folder.work,
                basis=plan.basis,
            )
        state.save({}, store)
    return bool(ranks.leaders(state.curvature))


def _curvature_of(
    number: int, stream: LayerStream, folder: OutputFolder | None, ranks: Ranks
) -> torch.Tensor:
    assert stream.hidden is not None
    width = stream.hidden.shape[-1]
    root = read_root(folder.work, number) if folder else torch.empty(width, width)
    ranks.leaders_tensor(root)
    return root


def _products(plan: Plan, device: torch.device) -> torch.dtype:
    """The type of the products in layers that calibration text runs through.

    Narrow only where the model's own will be; and not for refinement, which descends on differences finer than that.
    """
    stored = plan.checkpoint.tensors.values()
    sixteen = sum(info.bytes for info in stored if info.dtype in ("BF16", "F16"))
    if plan.recipe.refine or 2 * sixteen <= plan.checkpoint.bytes:
        return torch.float32
    return product_dtype(device, min((s.weights.bits for s in plan.schemes.values()), default=16))


def _unfinished(plan: Plan, state: RunState, tell: Progress) -> Iterator[int]:
    total = plan.structure.num_layers
    for number in range(state.done, total):
        tell(number, total, f"layer {number}")
        yield number


def _round_layers(plan: Plan, folder: OutputFolder, state: RunState, tell: Progress) -> None:
    for number in _unfinished(plan, state, tell):
        with state.stage("round"):
            state.layers.append(round_layer(plan, plan.structure.prefix(number), folder))
        folder.end_of_layer()
        state.done = number + 1
        state.save({}, Activations(folder.work))


def _calibration(
    plan: Plan,
    calib: str,
    samples: int | None,
    seqlen: int | None,
    seed: int,
    trust_remote_code: bool,
) -> CalibrationSet:
    settings = plan.recipe.calibration
    length = seqlen or min(settings.seqlen, plan.structure.max_positions)
    tokenizer = load_tokenizer(plan.checkpoint.path, trust_remote_code=trust_remote_code)
    return calibration_blocks(tokenizer, calib, samples or settings.samples, length, seed)


def _one_layer(
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
        if stream.hidden is None:
            arguments: tuple[Any, Any] = ({}, None)
            reference = None
        else:
            reference = _Reference(_ERROR_BLOCKS - stream.first, ranks)
            gptq = {
                group.name for group in structure.inputs
                if any(plan.recipe.uses_gptq(prefix + name) for name in group.linears)
            }  # fmt: skip
            with (
                state.stage("calibrate"),
                _at(number),
                observe(
                    layer,
                    structure,
                    hessians=gptq,
                    keep_rows=_SEARCH_ROWS,
                    batches=stream.batches,
                    products=stream.products,
                    ranks=ranks,
                ) as arguments,
            ):
                stream.run(layer, number, reference.keep)
            if stream.hidden_reference is not None:
                stream.advance_reference(layer, number)
        with state.stage("quantize"):
            result = quantize_layer(
                layer,
                prefix,
                plan.recipe,
                plan.schemes,
                structure,
                *arguments,
                norm_dtype=norm_dtype,
                ranks=ranks,
            )
        arguments = ({}, None)  # the Hessians of wide layers are as large as they are
        if stream.hidden is not None:
            _quantize_cache(plan, layer.get_submodule(structure.attention.path), result)
        if plan.recipe.refine:
            with state.stage("refine"):
                _refine(plan, stream, number, layer, result, norm_dtype, curvature, ranks)
        if folder:
            with state.stage("write"):
                _write_layer(plan, prefix, layer, result, folder)
        if stream.hidden is not None and reference is not None:
            before = stream.hidden[: reference.blocks].clone()
            with state.stage("advance"):
                stream.advance(layer, number)
            result.report["output_error"] = reference.error(before, stream.hidden)
    return result


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
