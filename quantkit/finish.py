"""What comes after the layers: the rest of the checkpoint, config.json, verification, the report, the move into place."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.calibration.activations import Activations
from quantkit.calibration.data import CalibrationSet
from quantkit.errors import InternalError
from quantkit.formats.config import KV_FILE, build_quantization_config
from quantkit.formats.writer import OutputFolder, save_tensors, write_json
from quantkit.models.names import BUNDLED
from quantkit.plain import copy_tensor
from quantkit.plan import Plan
from quantkit.resume import RunState

_log = logging.getLogger(__name__)
REPORT_FILE = "quantkit/report.json"
# The recipe as it was resolved, for --recipe.
RECIPE_FILE = "quantkit/recipe.yaml"

Progress = Callable[[int, int, str], None]


def complete(
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
    _write_and_verify(plan, folder, data, state, report, trust_remote_code)
    return report


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


def summary(model: str, plan: Plan, data: CalibrationSet | None, seed: int) -> dict[str, Any]:
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


def _write_and_verify(
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
        side[KV_FILE.as_posix()] = partial(save_tensors, scales)
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
            raise InternalError(
                f"{folder.path}: the output does not verify: {problems[0]}; quantize --overwrite makes it anew"
            )
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
