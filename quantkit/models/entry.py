"""What comes before the decoder layers: token ids -> the first layer's input, and what each layer is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class _Reached(Exception):
    """The last decoder layer was called: nothing behind it is wanted."""


@dataclass(frozen=True)
class LayerCall:
    """What a model calls one of its decoder layers with, beside the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output, [batch, tokens, hidden size]."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Recorder(nn.Module):
    """Stands where a decoder layer stands, and notes what the model calls it with."""

    def __init__(self, layer: nn.Module, last: bool, in_tuple: bool) -> None:
        super().__init__()
        # Not a sub-module: the model may read attributes of the layer, but must not see its parameters.
        self.__dict__["layer"] = layer
        self.last, self.in_tuple = last, in_tuple
        self.hidden: torch.Tensor | None = None
        self.call = LayerCall()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden_states, LayerCall(args, kwargs)
        if self.last:
            raise _Reached
        return (hidden_states,) if self.in_tuple else hidden_states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


@contextmanager
def _recorders(skeleton: nn.Module, layers: str, in_tuple: bool) -> Iterator[list[_Recorder]]:
    parent, _, name = layers.rpartition(".")
    owner: Any = skeleton.get_submodule(parent)
    originals: Any = getattr(owner, name)
    recorders = [_Recorder(layer, layer is originals[-1], in_tuple) for layer in originals]
    setattr(owner, name, nn.ModuleList(recorders))
    try:
        yield recorders
    finally:
        setattr(owner, name, originals)


@torch.no_grad()
def layer_calls(
    skeleton: Any, layers: str, embedded: torch.Tensor
) -> tuple[torch.Tensor, list[LayerCall]]:
    """Run a model up to its decoder layers.

    Args:
        skeleton: the model; all that its base model has outside the decoder layers has its weights.
        layers: path of the decoder layers' ModuleList.
        embedded: what the input embedding gives, [batch, tokens, embedding size].

    Returns:
        (the first layer's input [batch, tokens, hidden size], what each layer is called with).
    """
    try:
        return _record(skeleton, layers, embedded, in_tuple=False)
    except (TypeError, IndexError, AttributeError, RuntimeError, ValueError):
        return _record(skeleton, layers, embedded, in_tuple=True)


def _record(
    skeleton: Any, layers: str, embedded: torch.Tensor, in_tuple: bool
) -> tuple[torch.Tensor, list[LayerCall]]:
    with _recorders(skeleton, layers, in_tuple) as recorders, suppress(_Reached):
        skeleton.base_model(inputs_embeds=embedded, use_cache=False)
    seen = [recorder.hidden for recorder in recorders]
    first = seen[0]
    # A model that takes the first of a layer's tuple would get a row of what is none.
    if first is None or any(hidden is None or hidden.shape != first.shape for hidden in seen):
        raise ValueError("the decoder layers are not called one after the other")
    return first, [recorder.call for recorder in recorders]


@contextmanager
def outside(
    skeleton: Any,
    layers: str,
    load: Callable[[str, nn.Parameter], torch.Tensor],
    device: torch.device | str = "cpu",
) -> Iterator[nn.Module]:
    """Within the context, the base model's parameters outside the decoder layers have values, then none again.

    Args:
        load: (full name, the empty parameter) -> its value.

    Yields:
        The input embedding.
    """
    base: Any = skeleton.base_model
    used = {id(parameter) for parameter in base.parameters()}
    given: list[tuple[Any, str, nn.Parameter]] = []
    modules = {n: m for n, m in skeleton.named_modules() if not n.startswith(layers + ".")}
    for name, module in modules.items():
        for kind, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) not in used or not parameter.is_meta:
                continue
            value = load(f"{name}.{kind}", parameter).to(device)
            given.append((module, kind, parameter))
            module._parameters[kind] = nn.Parameter(value, requires_grad=False)
        if module is not base and not any(True for _ in module.children()):
            for kind, buffer in list(module._buffers.items()):
                if buffer is not None and not buffer.is_meta:
                    module._buffers[kind] = buffer.to(device)
    try:
        yield base.get_input_embeddings()
    finally:
        for module, kind, parameter in given:
            module._parameters[kind] = parameter
