"""What several commands need to know of the models a user names or leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError

# torch comes with what reads checkpoints, and `quantkit --help` must not wait for it.


def model_or_last(model: str | None) -> str:
    """The model named, or the one quantized last into a folder of the working directory."""
    from quantkit.formats.writer import is_ours

    if model is not None:
        return model
    ours = [
        p
        for p in Path.cwd().iterdir()
        if p.is_dir() and (p / "config.json").is_file() and is_ours(p)
    ]
    if not ours:
        raise QuantkitError(
            "no MODEL named, and none was quantized into this folder; name one, or run quantize first"
        )
    return str(max(ours, key=lambda p: (p / "config.json").stat().st_mtime).relative_to(Path.cwd()))


def source_of(model: str) -> str | None:
    """The original of a quantized checkpoint, if it is recorded and still there."""
    from quantkit.formats.checkpoint import Checkpoint
    from quantkit.models.names import find_model

    report = find_model(model) / "quantkit" / "report.json"
    try:
        source = json.loads(report.read_text(encoding="utf-8"))["source"]
        Checkpoint(find_model(source))
    except (OSError, ValueError, KeyError, TypeError, QuantkitError):
        return None
    return str(source)


def weights_bytes(model: str) -> int:
    """Bytes of a checkpoint's tensors."""
    from quantkit.formats.checkpoint import Checkpoint
    from quantkit.models.names import find_model

    return Checkpoint(find_model(model)).bytes


def tokenizer_of(model: str) -> Any:
    from quantkit.models.names import find_model
    from quantkit.models.tokenizer import load_tokenizer

    return load_tokenizer(find_model(model))
