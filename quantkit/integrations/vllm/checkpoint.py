"""A checkpoint is looked through before vLLM loads it: vLLM itself does not miss a tensor that is not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint, TensorInfo
from quantkit.formats.config import QuantizationInfo, parse_quantization_config
from quantkit.formats.packed import expected_tensors

KV_FILE = Path("quantkit") / "kv.safetensors"
_PATTERNS = ["*.json", "*.safetensors", "quantkit/*"]


@dataclass
class Examined:
    """What the plugin needs to know of a checkpoint.

    Attributes:
        info: schemes, the cache's format.
        kv_scales: layer number -> factor on keys after RoPE, float32 [KV heads, head_dim].
        whole: whether every tensor that the model has was looked for; else the quantized ones alone.
    """

    info: QuantizationInfo
    kv_scales: dict[int, torch.Tensor] = field(default_factory=dict)
    whole: bool = True


def parse(config: dict[str, Any], where: str) -> QuantizationInfo:
    """`parse_quantization_config`, with a refusal that names the package to upgrade."""
    try:
        return parse_quantization_config({"quantization_config": config}, where)
    except QuantkitError as error:
        hint = "pip install --upgrade quantkit"
        message = str(error)
        if "update quantkit" not in message:
            raise
        raise QuantkitError(message.replace("update quantkit", hint)) from None


def examine(model: str, revision: str | None = None) -> Examined:
    """Headers, shapes and extra tensors of a checkpoint; no weight is read.

    Args:
        model: a folder or a hub id.

    Raises:
        QuantkitError: a file or tensor is missing, cut off, or of another shape than config.json says.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _from_hub(model, revision)
    checkpoint = Checkpoint(folder)
    info = parse(checkpoint.config["quantization_config"], str(folder))
    for name, scheme in info.schemes.items():
        _check_module(checkpoint, name, scheme)
    whole = _check_model(checkpoint, info)
    checkpoint.close()
    return Examined(info, _kv_scales(folder, info), whole)


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub's errors have no common base
        raise QuantkitError(
            f"{model}: no such folder, and not to be had from the hub ({type(error).__name__})"
        ) from None


def _check_module(checkpoint: Checkpoint, name: str, scheme: Any) -> None:
    """The tensors of one quantized linear fit each other."""
    shape = _shape(checkpoint.tensors, name)
    if shape is None:
        raise QuantkitError(
            f"{checkpoint.path}: config.json says {name} is quantized; its weight is missing. "
            "The checkpoint is not complete: copy or quantize it again"
        )
    for suffix, expected in expected_tensors(scheme, *shape).items():
        _compare(checkpoint, f"{name}.{suffix}", *expected)


def _shape(tensors: dict[str, TensorInfo], name: str) -> tuple[int, int] | None:
    """(rows, columns) of a quantized weight, packed or not."""
    if f"{name}.weight" in tensors:
        rows, columns = tensors[f"{name}.weight"].shape
        return rows, columns
    if f"{name}.weight_packed" not in tensors:
        return None
    rows, words = tensors[f"{name}.weight_packed"].shape
    return rows, words * 8


def _compare(checkpoint: Checkpoint, name: str, dtype: str | None, shape: tuple[int, ...]) -> None:
    found = checkpoint.tensors.get(name)
    if found is None:
        raise QuantkitError(
            f"{checkpoint.path}: tensor {name!r} is missing; the checkpoint is not complete: "
            "copy or quantize it again"
        )
    if found.shape != shape or (dtype and found.dtype != dtype):
        raise QuantkitError(
            f"{checkpoint.path}: {name} is {found.dtype} {list(found.shape)}; "
            f"{dtype or 'shape'} {list(shape)} is expected"
        )


def _check_model(checkpoint: Checkpoint, info: QuantizationInfo) -> bool:
    """Every tensor of the model is there; False where transformers cannot build it to ask."""
    try:
        names = _model_tensors(checkpoint)
    except (
        Exception
    ):  # whatever a newer or rarer architecture raises: vLLM may know it all the same
        return False
    for name, shape in names.items():
        module, _, kind = name.rpartition(".")
        if module in info.schemes and kind == "weight":
            rows_columns = _shape(checkpoint.tensors, module)
            if rows_columns != shape:
                raise QuantkitError(
                    f"{checkpoint.path}: {module} is {list(rows_columns or ())} in the files, "
                    f"{list(shape)} by config.json"
                )
        elif not any(quantized.startswith(f"{module}.") for quantized in info.schemes):
            # Experts are single linears in the files and one tensor in transformers.
            _compare(checkpoint, name, None, shape)
    return True


def _model_tensors(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the unquantized model's tensors, without tied copies."""
    from transformers import AutoModelForCausalLM

    from quantkit.models.structure import load_config

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            load_config(checkpoint.config, str(checkpoint.path))
        )
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}


def _kv_scales(folder: Path, info: QuantizationInfo) -> dict[int, torch.Tensor]:
    path = folder / KV_FILE
    if not info.kv_cache:
        return {}
    if not path.is_file():
        if info.meta.get("post_rope_scale"):
            raise QuantkitError(
                f"{path}: is missing; the keys of this checkpoint cannot be read without it"
            )
        return {}
    try:
        return {int(layer): scale.float() for layer, scale in load_file(str(path)).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise QuantkitError(f"{path}: cannot be read ({error})") from None
