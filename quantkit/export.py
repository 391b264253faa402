"""A checkpoint rewritten into what stock servers run: no requirement, no INT4 cache, rotations gone.

Where a server's scheme takes the packed weights as they are, only the header is new. Otherwise they are quantized
again: from the original checkpoint if it is still there, else from the packed weights' values in the original basis.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.sources import BUNDLED_CALIBRATION
from quantkit.errors import InternalError, QuantkitError
from quantkit.finish import REPORT_FILE
from quantkit.formats.bits import unpack
from quantkit.formats.checkpoint import Checkpoint, read_json
from quantkit.formats.config import (
    QuantizationInfo,
    build_quantization_config,
    parse_quantization_config,
    requirements,
)
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.formats.writer import OutputFolder, write_json
from quantkit.methods.hadamard import rotate
from quantkit.methods.rounding import Grid, dequantize
from quantkit.models.names import find_model
from quantkit.pipeline import Progress, quantize
from quantkit.recipe import Recipe
from quantkit.servers import who_serves


@dataclass(frozen=True)
class Target:
    """What can be asked for.

    Attributes:
        scheme: of every quantized linear; None for plain 16-bit weights.
        recipe, overrides: how to quantize into it, where the packed weights do not fit it.
    """

    scheme: Scheme | None
    recipe: str = ""
    overrides: tuple[str, ...] = ()

    def takes(self, found: Scheme) -> bool:
        """Whether a linear of this scheme needs another header only."""
        want = self.scheme
        if want is None or requirements({"": found}) or found.weights.bits != want.weights.bits:
            return False
        if want.weights.group_size is None and found.weights.group_size is not None:
            return False
        # A loader finds FP8 codes in the scales of W4A8-FP8: they must be such products.
        fp8 = want.weights.scale.startswith("fp8")
        return not fp8 or (
            found.weights.scale.startswith("fp8")
            and found.weights.group_size == want.weights.group_size
        )


_PLAIN_CACHE = ("kv_cache=null", "rope_scaling=null")
TARGETS = {
    "w4a8-fp8": Target(
        Scheme(WeightFormat(4, 128, "fp8_channel"), ActivationFormat(8, "float")),
        "fireq",
        _PLAIN_CACHE,
    ),
    "w4a16": Target(
        Scheme(WeightFormat(4, 128)),
        "fireq",
        (*_PLAIN_CACHE, "activations=null", "weights.scale=bf16"),
    ),
    "w8a8": Target(Scheme(WeightFormat(8, None), ActivationFormat(8)), "crossquant"),
    "bf16": Target(None),
}
# What stock loaders of compressed-tensors run; which of the targets that means is our choice.
DEFAULT = "w4a8-fp8"
NATIVE = "compressed-tensors-native"
_GGUF = (
    "--to gguf: no; the gguf package writes tensors, but names, tokenizer and permutations of each architecture "
    "are in llama.cpp's convert_hf_to_gguf.py alone: use --to bf16 and run that on the result"
)


def find_target(name: str) -> str:
    """The name in TARGETS of what a user asked for.

    Raises:
        QuantkitError: there is no such target.
    """
    if name == "gguf":
        raise QuantkitError(_GGUF)
    name = DEFAULT if name == NATIVE else name
    if name not in TARGETS:
        raise QuantkitError(f"--to {name}: unknown; {', '.join((NATIVE, *TARGETS))} are known")
    return name


def export(
    model: str | Path,
    to: str = NATIVE,
    output: str | Path | None = None,
    *,
    calib: str = BUNDLED_CALIBRATION,
    samples: int | None = None,
    seqlen: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rewrite a checkpoint of quantkit for servers that have no plugin.

    Args:
        model: its folder.
        to: one of TARGETS, or `compressed-tensors-native` for the default.
        output: where to; `./<model>-<to>` if left out.
        calib, samples, seqlen, device, progress: as for `quantize`, where weights are quantized again.
        overwrite: replace a finished output of ours.

    Returns:
        `output`, `to`, `scheme`, `requantized` (None, or from what) and `servers`.

    Raises:
        QuantkitError: no such target, not a checkpoint of quantkit, or nothing to do.
        InternalError: the output did not verify.
    """
    name = find_target(to)
    target = TARGETS[name]
    checkpoint = Checkpoint(find_model(str(model)))
    info = parse_quantization_config(checkpoint.config, str(model))
    wanted = dict.fromkeys(info.schemes, target.scheme) if target.scheme else {}
    if wanted == info.schemes and not info.kv_cache:
        raise QuantkitError(f"{model}: is {target.scheme} already; stock servers load it as it is")
    path = Path(output) if output is not None else Path(f"{checkpoint.path.name}-{name}")
    requantized = None
    if target.scheme is None:
        _write_dequantized(checkpoint, info, path, overwrite)
    elif info.schemes and all(target.takes(scheme) for scheme in info.schemes.values()):
        _write_with_header(checkpoint, info, target.scheme, path, overwrite)
    else:
        again = partial(
            quantize, recipe=Recipe.load(target.recipe, list(target.overrides)), output=path,
            calib=calib, samples=samples, seqlen=seqlen, device=device,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
        requantized = _requantize(checkpoint, info, path, again)
    return _finish(checkpoint, path, name, requantized)


def dequantized(checkpoint: Checkpoint, name: str, scheme: Scheme) -> torch.Tensor:
    """The weight that a packed linear stands for, without online rotation: float32 [N, K]."""
    scale = checkpoint.load(f"{name}.weight_scale").float()
    if scheme.packs:
        _, columns = checkpoint.load(f"{name}.weight_shape").tolist()
        packed = checkpoint.load(f"{name}.weight_packed")
        codes = unpack(packed, scheme.weights.bits, columns)
    else:
        codes = checkpoint.load(f"{name}.weight")
    weight = dequantize(codes, scale, Grid(scheme.weights.bits, scheme.weights.half))
    return rotate(weight, scheme.rotation, inverse=True) if scheme.rotation else weight


def _write_with_header(
    checkpoint: Checkpoint, info: QuantizationInfo, scheme: Scheme, path: Path, overwrite: bool
) -> None:
    """The same tensors under another header."""
    schemes = {
        name: replace(found, activations=scheme.activations) for name, found in info.schemes.items()
    }
    ignored = checkpoint.config["quantization_config"].get("ignore", [])
    meta = {k: v for k, v in info.meta.items() if k not in ("requires", "shards")}

    def config(hashes: dict[str, str]) -> dict[str, Any]:
        quantization = build_quantization_config(
            schemes, ignored, None, meta | {"shards": hashes, "post_rope_scale": False}
        )
        return checkpoint.config | {"quantization_config": quantization}

    with OutputFolder(path, overwrite=overwrite) as folder:
        for name in checkpoint.tensors:
            folder.add(name, checkpoint.load(name))
            folder.end_of_layer()
        folder.finish(_side_files(checkpoint.path, report=True), config, _check)


def _write_dequantized(
    checkpoint: Checkpoint, info: QuantizationInfo, path: Path, overwrite: bool = False
) -> None:
    """A checkpoint in 16 bits with the packed weights' values."""

    def config(_: dict[str, str]) -> dict[str, Any]:
        return {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}

    with OutputFolder(path, overwrite=overwrite) as folder:
        for name in checkpoint.tensors:
            module, _, kind = name.rpartition(".")
            if module not in info.schemes or kind == "bias":
                folder.add(name, checkpoint.load(name))
            elif kind == "weight_scale":
                weight = dequantized(checkpoint, module, info.schemes[module])
                folder.add(f"{module}.weight", weight.to(torch.bfloat16))
            folder.end_of_layer()
        folder.finish(_side_files(checkpoint.path, report=False), config)


def _requantize(
    checkpoint: Checkpoint, info: QuantizationInfo, path: Path, again: Callable[[str], Any]
) -> str:
    """Quantize the original, or what the packed weights stand for; which of them, for the user."""
    original = _original(checkpoint.path)
    if original is not None:
        again(original)
        return original
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantkit-export-") as work:
        source = Path(work) / "model"
        _write_dequantized(checkpoint, info, source)
        again(str(source))
    return "its packed weights"


def _original(folder: Path) -> str | None:
    """The checkpoint that this one was made from, if it is recorded and still there."""
    try:
        source = read_json(folder / REPORT_FILE).get("source")
        Checkpoint(find_model(str(source)))
    except QuantkitError:
        return None
    return str(source)


def _side_files(folder: Path, *, report: bool) -> dict[str, Callable[[Path], None]]:
    """Tokenizer, generation and licence files, and the report; the model card is another's."""
    files = [
        file for file in folder.iterdir()
        if file.is_file() and "safetensors" not in file.name and file.name not in ("config.json", "README.md")
    ]  # fmt: skip
    side: dict[str, Callable[[Path], None]] = {f.name: partial(_copy, f) for f in files}
    if report and (folder / REPORT_FILE).is_file():
        side[REPORT_FILE] = partial(_copy, folder / REPORT_FILE)
    return side


def _check(output: Path) -> None:
    from quantkit.verify import verify

    problems = verify(output).problems
    if problems:
        raise InternalError(f"{output.parent}: the output does not verify: {problems[0]}")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _finish(
    checkpoint: Checkpoint, path: Path, name: str, requantized: str | None
) -> dict[str, Any]:
    """Bring the report up to date."""
    result: dict[str, Any] = {"output": str(path), "to": name, "requantized": requantized}
    if TARGETS[name].scheme is None:
        return result | {"scheme": "16 bits", "servers": {}}
    info = parse_quantization_config(Checkpoint(path).config, str(path))
    result["scheme"] = ", ".join(sorted({str(s) for s in info.schemes.values()}))
    result["servers"] = who_serves(info.schemes, info.kv_cache)
    record(path, servers=result["servers"], exported_from=str(checkpoint.path.resolve()),
           **_source(checkpoint))  # fmt: skip
    return result


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a requantized checkpoint's own report cannot know: a folder that is gone is no original."""
    try:
        return {"source": read_json(checkpoint.path / REPORT_FILE)["source"]}
    except (QuantkitError, KeyError):
        return {}


def record(path: Path, **facts: Any) -> None:
    """Add facts to an output's report."""
    file = path / REPORT_FILE
    write_json(file, (read_json(file) if file.is_file() else {}) | facts)
