"""What a user may call a model: a folder, a hub id, or an alias."""

from __future__ import annotations

import difflib
import re
from importlib.resources import files
from pathlib import Path

from quantkit.errors import QuantkitError

# The small Llama that comes with the package.
BUNDLED = "llama"
# Never pickles, never code: what a checkpoint needs to be read and to be served again.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def bundled_path() -> Path:
    return Path(str(files("quantkit.assets"))) / "llama"


def short_name(model: str) -> str:
    """The name of the default output folder's first half: the last part of a path or hub id."""
    return Path(model).resolve().name if Path(model).exists() else model.rstrip("/").split("/")[-1]


def find_model(model: str) -> Path:
    """The folder that `model` means. A hub id is taken from the local cache or downloaded.

    Raises:
        QuantkitError: no such folder, alias or hub id, or the hub cannot be reached.
    """
    if model == BUNDLED:
        return bundled_path()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise QuantkitError(f"{model}: is a file; name the folder that holds config.json")
    if _HUB_ID.fullmatch(model) and not model.startswith((".", "/")):
        return _from_hub(model)
    close = difflib.get_close_matches(model, [BUNDLED], cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise QuantkitError(f"{model}: no such model; {hint}name a folder, or a hub id like org/name")


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the hub's errors have no common base and change between releases
        reason = type(error).__name__
        raise QuantkitError(
            f"{model}: no such folder, and not to be had from the hub ({reason}); "
            "check the name, the network, or HF_TOKEN for a private model"
        ) from None
