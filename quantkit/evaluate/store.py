"""Results kept beside the model they were measured on: quantkit/eval.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import read_json
from quantkit.formats.writer import is_ours

EVAL_FILE = "quantkit/eval.json"
# Of the JSON form of an evaluation: what is kept per text, and per lm-eval's model.
_PER_TEXT = ("ppl", "baseline", "divergence")


def keep(result: dict[str, Any], folder: Path) -> Path | None:
    """Add a result to those beside its model: a text measured again replaces what was there.

    Args:
        result: the JSON form of one model's evaluation.
        folder: the model's.

    Returns:
        The file; None if the folder is not an output of quantkit, or cannot be written.
    """
    if not is_ours(folder):
        return None
    path = folder / EVAL_FILE
    merged = merge(stored(folder) or {}, result)
    draft = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        draft.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        return None
    return path


def stored(folder: Path) -> dict[str, Any] | None:
    """What was measured of the model in a folder, or None. A file that cannot be read counts as none."""
    if not (folder / EVAL_FILE).is_file():
        return None
    try:
        return read_json(folder / EVAL_FILE)
    except QuantkitError:
        return None


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A new result over an old one. Against another original, the old comparisons mean nothing: they go."""
    if old.get("baseline_model") != new.get("baseline_model"):
        old = {}
    merged = old | {key: value for key, value in new.items() if value or key not in old}
    for key in _PER_TEXT:
        both = {**(old.get(key) or {}), **(new.get(key) or {})}
        merged[key] = both or None
    merged["ppl"] = merged["ppl"] or {}
    tasks: dict[str, Any] = {}
    for scores in (old.get("tasks") or {}, new.get("tasks") or {}):
        for model, found in scores.items():
            tasks[model] = tasks.get(model, {}) | found
    return merged | ({"tasks": tasks} if tasks else {})
