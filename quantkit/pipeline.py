"""The main job: plan -> per layer (calibrate -> transform -> quantize -> write) -> verify -> report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
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
from quantkit.calibration.stream import LayerStream
from quantkit.device import find_device
from quantkit.errors import QuantkitError
from quantkit.estimate import check_disk, choose_offload
from quantkit.finish import RECIPE_FILE, Progress, complete, summary
from quantkit.formats.writer import OutputFolder, clear_up, writing
from quantkit.models.tokenizer import load_tokenizer
from quantkit.plain import round_layer, rounds_plainly
from quantkit.plan import Plan, default_output, make_plan
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import Recipe
from quantkit.resume import RunState, check_alike, describe_run, digest, finished_report
from quantkit.step import narrow_products, run_layer


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
    request = _Request(model, calib, samples, seqlen, seed, trust_remote_code)
    where = ranks.device(find_device(device))
    plan = request.plan(recipe)
    tell = progress or (lambda done, total, what: None)
    allocation = None
    target = find_target(target_bits, target_size)
    if target is not None:
        choice = widths_for(recipe, widths)
        check_target(plan, target, choice)
        text = request.blocks(plan, at_most=SAMPLES)
        recipe, allocation = allocate(plan, target, text, choice, where, tell, ranks)
        plan = request.plan(recipe)  # measuring has used the skeleton up
    on_disk = choose_offload(plan.estimate, offload, where, plan.smaller, ranks.on_this_machine)
    path = Path(output) if output is not None else default_output(model, recipe)

    def unchanged() -> dict[str, Any] | None:
        clear_up(path)
        earlier = None if overwrite else finished_report(path)
        if earlier is None:
            return None
        run = describe_run(plan, request.text(plan), seed, where)
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
        data = request.text(plan)
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


@dataclass(frozen=True)
class _Request:
    """What is to be quantized and with which text, as it was asked for."""

    model: str
    calib: str
    samples: int | None
    seqlen: int | None
    seed: int
    trust_remote_code: bool

    def __post_init__(self) -> None:
        check_sources(self.calib)
        for name, value, least in (("samples", self.samples, 1), ("seqlen", self.seqlen, 2)):
            if value is not None and value < least:
                raise QuantkitError(f"--{name} {value}: at least {least} is needed")

    def plan(self, recipe: Recipe) -> Plan:
        plan = make_plan(
            self.model,
            recipe,
            samples=self.samples,
            seqlen=self.seqlen,
            trust_remote_code=self.trust_remote_code,
        )
        longest = plan.structure.max_positions
        if self.seqlen is not None and self.seqlen > longest:
            raise QuantkitError(
                f"--seqlen {self.seqlen}: the model was made for at most {longest} tokens"
            )
        return plan

    def text(self, plan: Plan) -> CalibrationSet | None:
        """The calibration blocks, where the recipe needs some."""
        return self.blocks(plan) if plan.recipe.needs_calibration else None

    def blocks(self, plan: Plan, at_most: int | None = None) -> CalibrationSet:
        """As many calibration blocks as were asked for, or `at_most` so many."""
        settings = plan.recipe.calibration
        samples = self.samples or settings.samples
        samples = samples if at_most is None else min(at_most, samples)
        length = self.seqlen or min(settings.seqlen, plan.structure.max_positions)
        tokenizer = load_tokenizer(plan.checkpoint.path, trust_remote_code=self.trust_remote_code)
        return calibration_blocks(tokenizer, self.calib, samples, length, self.seed)


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
            # Refinement compares what the layers give in finer steps than those of narrow products.
            products=torch.float32 if plan.recipe.refine else narrow_products(plan, device),
        )
    measured = _measure_curvature(plan, data, device, folder, state, store, ranks)
    for number in _unfinished(plan, state, tell):
        # Whatever is drawn at random is a function of seed and layer, also in a run that was gone on with.
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + number)
            root = _curvature_of(number, stream, folder, ranks) if measured else None
            result = run_layer(plan, stream, number, folder, state, root, ranks)
        state.layers.append(result.report)
        if result.post_scale is not None:
            state.scales[str(number)] = result.post_scale.cpu()
        if folder:
            folder.end_of_layer()
        state.done = number + 1
        live = {} if state.done == plan.structure.num_layers else stream.chains()
        state.save(live, store)


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
