"""Sizes in a config.json that came from somewhere, held against the tensors that came with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZE = re.compile(r"^(n_|num_)|(size|dim|heads|experts|rank|width|_inner|_embd)$")
_POSITIONS = re.compile(r"position|^n_ctx$|^sliding_window$|^seq_length$")


def check_sizes(config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse sizes that no tensor of the checkpoint bears out, before a model is laid out by them.

    Raises:
        QuantkitError: a size in config.json is negative or larger than the largest tensor has numbers, or
            more layers are named than there are tensors.
    """
    largest = max((math.prod(i.shape) for i in checkpoint.tensors.values()), default=0)
    for key, value in _numbers(config, ""):
        name = key.rpartition(".")[2]
        layers = name in _LAYERS
        most = len(checkpoint.tensors) if layers else max(largest, 1 << 20)
        if _POSITIONS.search(name):
            most = 1 << 28
        elif not (layers or _SIZE.search(name)):
            continue
        if not -1 <= value <= most:
            raise QuantkitError(
                f"{checkpoint.path / 'config.json'}: {key} is {str(value)[:40]}; the checkpoint's tensors do not bear that out"
            )


def _numbers(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """(place, number) of every whole number in a JSON object."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value
