"""A checkpoint run with one decoder layer in memory at a time, by the model's own forward.

Each decoder layer is replaced by one that is read when it is called and emptied afterwards; of the embedding only
the rows that occur are read, and the output layer is read in pieces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.config import parse_quantization_config
from quantkit.memory import trim
from quantkit.models.files import ModelCheckpoint, in_model_names
from quantkit.models.structure import build_skeleton, find_structure, load_config
from quantkit.runtime.attention import NAME, register
from quantkit.runtime.linear import QuantLinear
from quantkit.runtime.load import attach_quantizers, replace_linears

# Rows of the output layer that are read at a time.
_HEAD_ROWS = 8192


@torch.no_grad()
def streamed_logits(
    path: Path, tokens: torch.Tensor, *, trust_remote_code: bool = False
) -> torch.Tensor:
    """Logits float32 [1, seqlen, vocabulary] of a quantized checkpoint for tokens int64 [1, seqlen].

    Raises:
        QuantkitError: the checkpoint is broken, or not one of ours.
    """
    source = Checkpoint(path)
    info = parse_quantization_config(source.config, str(path))
    if info.kv_cache:
        register()
    config = load_config(source.config, str(path), code=path if trust_remote_code else None)
    model: Any = build_skeleton(config, str(path), attention=NAME if info.kv_cache else "sdpa")
    structure = find_structure(model, str(path))
    checkpoint = ModelCheckpoint(source, model)
    info = in_model_names(info, checkpoint)
    replace_linears(model, checkpoint, info)
    if info.kv_cache:
        attach_quantizers(model, checkpoint, info)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    reader = _Reader(checkpoint, dtype)

    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted, place = tokens.unique(return_inverse=True)
    rows = checkpoint.gather(f"{names[id(embedding)]}.weight", wanted).to(dtype)
    layers = model.get_submodule(structure.layers)
    for number, layer in enumerate(layers):
        layers[number] = _StreamedLayer(layer, f"{structure.layers}.{number}.", reader)
    # A tied output layer has the embedding's weight, and no tensor of its own.
    rows_of = names[id(head)]
    if f"{rows_of}.weight" not in checkpoint.tensors:
        rows_of = names[id(embedding)]
    model.set_output_embeddings(_StreamedHead(head, rows_of, reader))
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    embedding.padding_idx = None  # it counts rows of the whole table
    reader.fill(model, "", skip={id(embedding)})
    logits: torch.Tensor = model(input_ids=place, use_cache=False).logits
    checkpoint.close()
    return logits.float()


class _Reader:
    """Gives modules their tensors."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype

    def tensor(self, name: str, packed: bool) -> torch.Tensor:
        if name not in self.checkpoint.tensors:
            raise QuantkitError(
                f"{self.checkpoint.path}: tensor {name!r} is missing; the checkpoint is not complete"
            )
        tensor = self.checkpoint.read(name)
        return tensor if packed else tensor.to(self.dtype)

    def fill(self, module: nn.Module, prefix: str, skip: set[int] | None = None) -> None:
        """Every parameter and stored buffer of a module on the meta device."""
        for name, child in module.named_modules():
            if skip and id(child) in skip:
                continue
            state = {}
            for kind, empty in child.state_dict(keep_vars=True).items():
                if "." not in kind and empty.is_meta:
                    packed = isinstance(child, QuantLinear) and kind != "bias"
                    full = f"{prefix}{name}.{kind}" if name else f"{prefix}{kind}"
                    state[kind] = self.tensor(full, packed)
            child.load_state_dict(state, strict=False, assign=True)
            if isinstance(child, QuantLinear):
                child.prepare()


class _StreamedLayer(nn.Module):
    """A decoder layer that is in memory only while it runs."""

    def __init__(self, layer: nn.Module, prefix: str, reader: _Reader) -> None:
        super().__init__()
        # Not a sub-module: the model may read attributes of the layer, but must not see its parameters.
        self.__dict__.update(layer=layer, prefix=prefix, reader=reader)

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        here = self.__dict__
        here["reader"].fill(here["layer"], here["prefix"])
        output = here["layer"](*arguments, **settings)
        here["layer"].to("meta")
        trim()
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


class _StreamedHead(nn.Module):
    """The output layer, read some rows at a time."""

    def __init__(self, head: Any, name: str, reader: _Reader) -> None:
        super().__init__()
        self.__dict__.update(name=name, reader=reader)
        self.rows = head.weight.shape[0]
        self.bias = head.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        reader: _Reader = self.__dict__["reader"]
        parts = []
        for first in range(0, self.rows, _HEAD_ROWS):
            span = (first, min(first + _HEAD_ROWS, self.rows))
            weight = reader.checkpoint.read(f"{self.__dict__['name']}.weight", rows=span)
            parts.append(nn.functional.linear(hidden, weight.to(hidden.dtype)))
        logits = torch.cat(parts, -1)
        return logits if self.bias is None else logits + self.bias
