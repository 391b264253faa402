"""The model as a stream of decoder layers: one is in memory at a time, the activations pass from each to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.calibration.activations import Activations
from quantkit.calibration.statistics import InputStatistics, KeyStatistics
from quantkit.formats.checkpoint import Checkpoint
from quantkit.memory import trim
from quantkit.models.groups import LayerStructure
from quantkit.models.structure import Structure

# Tokens per forward: enough to keep the cores busy, small enough that a layer's intermediates stay small.
_TOKENS_PER_BATCH = 4096


class _Recorder(nn.Module):
    """Stands where a decoder layer stands, and notes the arguments that the model calls it with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not a sub-module: the model may read attributes of the layer, but must not see its parameters.
        self.__dict__["layer"] = layer
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)


class LayerStream:
    """Loads decoder layers one by one in float32 and runs blocks of tokens through them.

    Args:
        checkpoint: the source.
        skeleton: the model on the meta device, from `build_skeleton`.
        structure: its structure.
        tokens: int64 [samples, seqlen], or None when nothing is to be run.
        device: where layers run.
        reference: keep what the original model's layers give too, beside what the quantized ones give.
        store: where activations live.
        done: layers that an earlier start has finished: the store has what they gave.

    Attributes:
        hidden: the quantized layers' outputs so far, the next layer's inputs, float32 [samples, seqlen, width].
        hidden_reference: the same of the original layers, or None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: nn.Module,
        structure: Structure,
        tokens: torch.Tensor | None,
        device: torch.device,
        reference: bool = False,
        store: Activations | None = None,
        done: int = 0,
    ) -> None:
        self._checkpoint = checkpoint
        self._structure = structure
        self._layers: Any = skeleton.get_submodule(structure.layers)
        self._device = device
        self._arguments: list[dict[str, Any]] = []
        self._store = store or Activations(Path())
        self.hidden: torch.Tensor | None = None
        self.hidden_reference: torch.Tensor | None = None
        if tokens is not None:
            self._batch = max(1, _TOKENS_PER_BATCH // tokens.shape[1])
            self._embed(skeleton, tokens, done)
            if reference:
                self.hidden_reference = self._start("hidden_reference", done, self.hidden)

    def chains(self) -> dict[str, torch.Tensor]:
        """The activations that go from layer to layer, by name."""
        both = {"hidden": self.hidden, "hidden_reference": self.hidden_reference}
        return {name: tensor for name, tensor in both.items() if tensor is not None}

    def _start(self, name: str, done: int, like: torch.Tensor | None) -> torch.Tensor:
        assert like is not None
        if done:
            return self._store.load(f"{done}-{name}", *like.shape)
        return self._store.empty(*like.shape).copy_(like)

    @torch.no_grad()
    def _embed(self, skeleton: nn.Module, tokens: torch.Tensor, done: int) -> None:
        """Run the model with its layers replaced: gives the first layer's input and every layer's arguments."""
        base: Any = skeleton.get_submodule(self._structure.layers.rpartition(".")[0])
        embedding = base.get_input_embeddings()
        name = next(n for n, m in skeleton.named_modules() if m is embedding)

        def embed(some: torch.Tensor) -> torch.Tensor:
            """Only the rows that occur are read."""
            wanted, place = some.unique(return_inverse=True)
            rows = self._checkpoint.gather(f"{name}.weight", wanted)
            embedding.weight = nn.Parameter(rows, requires_grad=False)
            found: torch.Tensor = embedding(place).float()
            embedding.to("meta")
            return found

        hidden = embed(tokens[:1])
        shape = (*tokens.shape, hidden.shape[-1])
        if done:
            self.hidden = self._store.load(f"{done}-hidden", *shape)
        else:
            self.hidden = self._store.empty(*shape)
            for first in range(0, len(tokens), self._batch):
                batch = tokens[first : first + self._batch]
                self.hidden[first : first + len(batch)] = embed(batch)
                self._store.release()

        recorders = [_Recorder(layer) for layer in self._layers]
        layers, norm = base.layers, base.norm
        base.layers, base.norm = nn.ModuleList(recorders), nn.Identity()
        base.rotary_emb.to(self._device)
        # One row is enough: all blocks have the same length and no padding, so masks and positions agree.
        base(inputs_embeds=hidden[:1].to(self._device), use_cache=False)
        base.layers, base.norm = layers, norm
        self._arguments = [recorder.arguments for recorder in recorders]

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """A decoder layer with its weights in float32 on the device; freed at the end."""
        layer = self._layers[number]
        prefix = f"{self._structure.layers}.{number}."
        state = {
            name: self._checkpoint.read(prefix + name, finite=True).to(self._device, torch.float32)
            for name, _ in layer.named_parameters()
        }
        layer.load_state_dict(state, strict=True, assign=True)
        try:
            yield layer
        finally:
            # Linears may have been replaced by simulations: drop the whole module, not only its parameters.
            self._layers[number] = nn.Identity()
            trim()

    @property
    def batches(self) -> int:
        return 0 if self.hidden is None else -(-self.hidden.shape[0] // self._batch)

    @torch.no_grad()
    def run(self, layer: nn.Module, number: int, sink: Callable[[int, torch.Tensor], None]) -> None:
        """Run every block through a layer; `sink(first, output)` gets the outputs of blocks first, first + 1, ..."""
        assert self.hidden is not None
        for first in range(0, self.hidden.shape[0], self._batch):
            batch = self.hidden[first : first + self._batch].to(self._device)
            output = layer(batch, **self._arguments[number])
            sink(first, output[0] if isinstance(output, tuple) else output)
            self._store.release()

    def advance(self, layer: nn.Module, number: int) -> None:
        """The layer's outputs become the next layer's inputs, in place."""
        hidden = self.hidden
        assert hidden is not None

        def replace(first: int, output: torch.Tensor) -> None:
            hidden[first : first + output.shape[0]] = output.to(hidden.device)

        self.run(layer, number, replace)


@contextmanager
def observe(
    layer: nn.Module, structure: LayerStructure, *, hessians: set[str], keep_rows: int, batches: int
) -> Iterator[tuple[dict[str, InputStatistics], KeyStatistics]]:
    """Hooks on a layer that collect statistics of every input group, and of the keys, while it runs.

    Args:
        structure: the layer's.
        hessians: names of the input groups whose Hessian is needed.
        keep_rows: how many tokens of each input to keep.
        batches: how many batches will come.
    """
    inputs: dict[str, InputStatistics] = {}
    handles = []
    for group in structure.groups:
        linear = layer.get_submodule(group.watched)
        weight: Any = linear.weight
        stats = InputStatistics(
            weight.shape[1],
            hessian=group.name in hessians,
            keep=keep_rows,
            batches=batches,
            device=weight.device,
        )
        inputs[group.name] = stats

        def hook(
            _: nn.Module, args: tuple[torch.Tensor, ...], stats: InputStatistics = stats
        ) -> None:
            stats.update(args[0])

        handles.append(linear.register_forward_pre_hook(hook))
    keys = KeyStatistics()
    attention: Any = layer.get_submodule(structure.attention.path)
    attention.key_observer = keys.update
    try:
        yield inputs, keys
    finally:
        del attention.key_observer
        for handle in handles:
            handle.remove()
