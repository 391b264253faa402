"""A checkpoint is looked through before vLLM loads it: vLLM itself does not miss a tensor that is not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import KV_FILE, QuantizationInfo, parse_quantization_config
from quantkit.formats.packed import expected_tensors
from quantkit.formats.scheme import Scheme

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
    whole = _check_model(checkpoint, info)
    if not whole:
        for name, scheme in info.schemes.items():
            _check_module(checkpoint, name, scheme)
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


def _check_module(checkpoint: Checkpoint, name: str, scheme: Scheme) -> None:
    """The tensors of one quantized linear are there and fit each other."""
    rows, columns = _shape(checkpoint, name, scheme.weights.bits)
    for suffix, (dtype, shape) in expected_tensors(scheme, rows, columns).items():
        found = checkpoint.tensors.get(f"{name}.{suffix}")
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            what = f"is {found.dtype} {list(found.shape)}" if found else "is missing"
            raise QuantkitError(
                f"{checkpoint.path}: {name}.{suffix} {what}; {dtype} {list(shape)} is expected"
            )


def _shape(checkpoint: Checkpoint, name: str, bits: int) -> tuple[int, int]:
    """(rows, columns) of a quantized weight, packed or not; vLLM's layers have multiples of 32 columns."""
    if plain := checkpoint.tensors.get(f"{name}.weight"):
        return plain.shape[0], plain.shape[1]
    if packed := checkpoint.tensors.get(f"{name}.weight_packed"):
        return packed.shape[0], packed.shape[1] * 32 // bits
    raise QuantkitError(
        f"{checkpoint.path}: config.json says {name} is quantized; its weight is missing"
    )


def _check_model(checkpoint: Checkpoint, info: QuantizationInfo) -> bool:
    """Every tensor of the model is there, as `quantkit.load` wants it; False where transformers cannot build it."""
    from transformers import AutoModelForCausalLM

    from quantkit.models.experts import unstack_experts
    from quantkit.models.files import ModelCheckpoint, check_complete, in_model_names
    from quantkit.models.structure import load_config
    from quantkit.runtime.load import replace_linears

    try:
        config = load_config(checkpoint.config, str(checkpoint.path))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (
        Exception
    ):  # whatever a newer or rarer architecture raises: vLLM may know it all the same
        return False
    unstack_experts(model)
    named = ModelCheckpoint(checkpoint, model)
    replace_linears(model, named, in_model_names(info, named))
    check_complete(model, named)
    return True


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
