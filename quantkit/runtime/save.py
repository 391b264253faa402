"""`save_pretrained` of a quantized model: the checkpoint again, bit for bit, though memory holds it repacked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint, read_json
from quantkit.formats.config import parse_quantization_config
from quantkit.formats.writer import UNFINISHED, sha256, writing

# What lies beside the model and belongs to it: FireQ's scales of the keys, the report.
SIDE_FOLDER = "quantkit"


def save_as_checkpoint(model: Any, checkpoint: Checkpoint) -> None:
    """Make `model.save_pretrained` write a whole quantkit checkpoint.

    Packed linears, and tensors that transformers makes no module for, are taken from the files that the
    model was loaded from; everything else from the model.

    Args:
        model: with its quantized linears in place.
        checkpoint: what it was loaded from.
    """
    plain = model.save_pretrained

    def save_pretrained(save_directory: str | Path, **kwargs: Any) -> None:
        """transformers' `save_pretrained`; see its documentation.

        Raises:
            QuantkitError: the checkpoint that the model was loaded from is gone or changed.
        """
        if kwargs.pop("push_to_hub", False):
            raise QuantkitError(
                "push_to_hub: save first, then `quantkit push FOLDER ORG/NAME`, which verifies what it uploads"
            )
        target = Path(save_directory)
        if target.resolve() == checkpoint.path.resolve():
            raise QuantkitError(f"{target}: the model was loaded from there; choose another folder")
        if getattr(model, "hf_quantizer", None) is None:  # which gives transformers the same
            kwargs["state_dict"] = checkpoint_tensors(model, checkpoint)
        # transformers' own renaming is left out: the names are the checkpoint's already.
        plain(save_directory, **kwargs | {"save_original_format": False})
        _complete(target, checkpoint)

    model.save_pretrained = save_pretrained


def checkpoint_tensors(model: Any, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Name -> tensor of the checkpoint that this model is.

    Raises:
        QuantkitError: the files that the model was loaded from are gone or changed.
    """
    info = parse_quantization_config(checkpoint.config, str(checkpoint.path))
    for name, want in (info.meta.get("shards") or {}).items():
        file = checkpoint.path / name
        if not file.is_file() or sha256(file) != want:
            raise QuantkitError(
                f"{file}: is gone or changed since the model was loaded; its packed weights are saved from there"
            )
    own = model.state_dict()
    return {
        name: checkpoint.load(name)
        if name.rpartition(".")[0] in info.schemes or name not in own or own[name].is_meta
        else own[name]
        for name in checkpoint.tensors
    }


def _complete(target: Path, checkpoint: Checkpoint) -> None:
    """What transformers does not know of: side files, and the record of what was written."""
    with writing(target):
        source = checkpoint.path / SIDE_FOLDER
        if source.is_dir():
            shutil.copytree(source, target / SIDE_FOLDER, dirs_exist_ok=True)
        quantization = json.loads(json.dumps(checkpoint.config["quantization_config"]))
        shards = sorted(target.glob("model*.safetensors"))
        quantization["quantkit"]["shards"] = {file.name: sha256(file) for file in shards}
        config = read_json(target / "config.json") | {"quantization_config": quantization}
        # Renamed into place, so that it is never seen half-written.
        half = target / f"config.json{UNFINISHED}"
        half.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        half.replace(target / "config.json")
