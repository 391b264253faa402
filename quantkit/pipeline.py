"""The main job: plan -> per layer (calibrate -> transform -> quantize -> write) -> verify -> report."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.allocation.allocate import (
    SAMPLES,
    allocate,
    check_target,
    find_target,
    widths_for,
)
from quantkit.calibration.activations import Activations
from quantkit.calibration.curvature import output_curvature
from quantkit.calibration.data import CalibrationSet, calibration_blocks
from quantkit.calibration.sources import check_sources, named_samples
from quantkit.calibration.stream import LayerStream, observe
from quantkit.device import find_device
from quantkit.errors import InternalError, QuantkitError
from quantkit.estimate import check_disk, choose_offload
from quantkit.formats.config import build_quantization_config
from quantkit.formats.packed import packed_tensors
from quantkit.formats.writer import OutputFolder, save_tensors, write_json
from quantkit.layer import QuantizedLayer, quantize_layer
from quantkit.models.groups import LayerStructure
from quantkit.models.names import BUNDLED
from quantkit.plain import copy_tensor, round_layer, rounds_plainly
from quantkit.plan import Plan, default_output, make_plan
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import Recipe
from quantkit.refinement import Task, refine_layer
from quantkit.resume import RunState, check_alike, describe_run, digest, finished_report

_log = logging.getLogger(__name__)
KV_FILE = "quantkit/kv.safetensors"
REPORT_FILE = "quantkit/report.json"
# The recipe as it was resolved, for --recipe.
RECIPE_FILE = "quantkit/recipe.yaml"
# Tokens of each linear's input that are kept for the search of channel factors.
_SEARCH_ROWS = 1024
# Blocks on which a quantized layer's output is compared with the original layer's.
_ERROR_BLOCKS = 4

Progress = Callable[[int, int, str], None]


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
    on_disk = choose_offload(plan.estimate, offload, where, ranks.on_this_machine)
    path = Path(output) if output is not None else default_output(model, recipe)

    def calibration() -> CalibrationSet | None:
        if not recipe.needs_calibration:
            return None
        return _calibration(plan, calib, samples, seqlen, seed, trust_remote_code)

    def unchanged() -> dict[str, Any] | None:
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
        if folder:
            check_disk(path, plan.estimate.disk_bytes)
        data = calibration()
        run = describe_run(plan, data, seed, where)
        check_alike(run, ranks)
        state = RunState(folder, ranks.leaders(folder.begin(run) if folder else None))
        _quantize_layers(plan, data, where, seed, folder, state, on_disk, tell, ranks)
        report: dict[str, Any] = {}
        if folder:
            with ranks.leader_works():
                more = _summary(model, plan, data, seed) | {"run": digest(run)}
                if allocation is not None:
                    more["allocation"] = allocation | {"recipe_file": RECIPE_FILE}
                report = _complete(plan, data, folder, state, more, trust_remote_code, tell)
        report = ranks.leaders(report)
    return report | {"output": str(path)}


def _output_folder(plan: Plan, path: Path, overwrite: bool) -> OutputFolder:
    folder = OutputFolder(path, overwrite=overwrite, tensors=3 * len(plan.checkpoint.tensors))
    folder.file_name = plan.checkpoint.file_name
    return folder


def _complete(
    plan: Plan,
    data: CalibrationSet | None,
    folder: OutputFolder,
    state: RunState,
    more: dict[str, Any],
    trust_remote_code: bool,
    tell: Progress,
) -> dict[str, Any]:
    """What comes after the layers; gives the report."""
    total = plan.structure.num_layers
    if not state.copied:
        tell(total, total, "writing")
        with state.stage("copy"):
            _copy_the_rest(plan, folder)
        state.copied = True
        state.save({}, Activations(folder.work))
    tell(total, total, "verifying")
    report = {"layers": state.layers} | more
    _finish(plan, folder, data, state, report, trust_remote_code)
    return report


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
    if state.done == plan.structure.num_layers:
        return
    if rounds_plainly(plan):
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
        )
    curvature = None
    if plan.recipe.refine and plan.recipe.refine.curvature and data:
        with state.stage("curvature"):
            curvature = output_curvature(
                plan.checkpoint, plan.skeleton, plan.structure, data.tokens, device
            )
        for root in curvature or ():
            ranks.leaders_tensor(root)
        if curvature and plan.basis:
            # |e C| for an error e is |turn(e) C'| for C' = R^T C.
            curvature = [plan.basis.turn(root.T).T for root in curvature]
    for number in _unfinished(plan, state, tell):
        # Whatever is drawn at random is a function of seed and layer, also in a run that was gone on with.
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + number)
            result = _one_layer(
                plan, stream, number, folder, state, curvature[number] if curvature else None, ranks
            )
        state.layers.append(result.report)
        if result.post_scale is not None:
            state.scales[str(number)] = result.post_scale.cpu()
        if folder:
            folder.end_of_layer()
        state.done = number + 1
        state.save(stream.chains(), store)


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


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder; QuantkitError if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        # False and not None: for None transformers asks on the terminal.
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    # transformers raises many kinds for a missing or broken tokenizer; a panic of tokenizers' is no Exception
    except BaseException as error:
        if "trust_remote_code" in str(error):
            raise QuantkitError(
                f"{path}: its tokenizer needs Python code that comes with the checkpoint (auto_map); "
                "read it, and if you trust it use --trust-remote-code"
            ) from None
        reason = " ".join(str(error).split())[:160]
        raise QuantkitError(f"{path}: no usable tokenizer in it ({reason})") from None


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


def _copy_the_rest(plan: Plan, folder: OutputFolder) -> None:
    """Embeddings, head, final norm, and whatever else lies in the checkpoint: byte for byte, or turned."""
    turned = plan.basis.outside if plan.basis else set()
    for name in plan.checkpoint.tensors:
        if not _in_a_layer(name, plan) and name not in turned:
            copy_tensor(plan.checkpoint, name, folder)
            folder.end_of_layer()
    if plan.basis:
        for turned_tensor in plan.basis.turn_outside(plan.checkpoint):
            like = turned_tensor.like
            with folder.tensor(turned_tensor.name, like.dtype, like.shape) as pieces:
                for piece in turned_tensor.pieces:
                    pieces.write(piece)
            folder.end_of_layer()


def _in_a_layer(name: str, plan: Plan) -> bool:
    head, _, rest = name.partition(plan.structure.layers + ".")
    number = rest.partition(".")[0]
    return not head and number.isdigit() and int(number) < plan.structure.num_layers


def _summary(model: str, plan: Plan, data: CalibrationSet | None, seed: int) -> dict[str, Any]:
    return {
        "source": str(plan.checkpoint.path.resolve()) if model != BUNDLED else BUNDLED,
        "recipe": plan.recipe.model_dump(),
        "version": quantkit.__version__,
        "torch": torch.__version__,
        "calibration": data.to_dict() | {"seed": seed} if data else None,
        "linear_bytes": dict(zip(("before", "after"), plan.linear_bytes)),
        "total_bytes": dict(zip(("before", "after"), plan.total_bytes)),
        "servers": plan.servers,
        "left_out": plan.notes,
    }


def _finish(
    plan: Plan,
    folder: OutputFolder,
    data: CalibrationSet | None,
    state: RunState,
    report: dict[str, Any],
    trust_remote_code: bool,
) -> None:
    """Side files, config.json, verification, the report, and the move into place."""
    scales = state.scales
    side: dict[str, Callable[[Path], None]] = {RECIPE_FILE: plan.recipe.save}
    if scales:
        side[KV_FILE] = partial(save_tensors, scales)
    for file in plan.checkpoint.path.iterdir():
        if _belongs(file) or (trust_remote_code and file.suffix == ".py"):
            side[file.name] = partial(shutil.copyfile, file)

    def check(output: Path) -> None:
        from quantkit.report.documents import write_documents
        from quantkit.verify import verify

        with state.stage("verify"):
            problems = verify(
                output,
                against=str(plan.checkpoint.path),
                trust_remote_code=trust_remote_code,
            ).problems
        if problems:
            raise InternalError(f"{folder.path}: the output does not verify: {problems[0]}")
        report["seconds"] = round(state.elapsed, 2)
        report["stages"] = {name: round(seconds, 2) for name, seconds in state.seconds.items()}
        write_json(output / REPORT_FILE, report)
        try:
            write_documents(output, folder.path.resolve().name)
        except Exception as error:  # hours of work are not thrown away for a page
            _log.warning("no report page was made (%s); `quantkit report` tries again", error)

    in_file = plan.checkpoint.file_module

    def config(hashes: dict[str, str]) -> dict[str, Any]:
        meta = {
            "version": quantkit.__version__,
            "recipe": plan.recipe.model_dump(exclude_defaults=True) | {"name": plan.recipe.name},
            "calibration": data.to_dict() if data else None,
            "shards": hashes,
            "post_rope_scale": bool(scales),
            "residual_basis": asdict(plan.basis) if plan.basis else None,
        }
        quantization = build_quantization_config(
            {in_file(name): scheme for name, scheme in plan.schemes.items()},
            # Under both names: vLLM knows the files', transformers its own.
            list({n: 0 for m in plan.unquantized_linears for n in (m, in_file(m))}),
            plan.recipe.kv_format(),
            meta,
        )
        # A head that was tied took the final norm's weight in, which the embedding must not have.
        untied = {"tie_word_embeddings": False} if plan.basis and plan.basis.tied else {}
        return plan.checkpoint.config | untied | {"quantization_config": quantization}

    folder.finish(side, config, check)


def _belongs(file: Path) -> bool:
    """Tokenizer and generation files go along; weights, their index, config.json and documents do not."""
    if not file.is_file() or file.name == "config.json" or "safetensors" in file.name:
        return False
    return file.suffix in (".json", ".jinja", ".txt", ".model")
