"""The model as a stream of decoder layers: one is in memory at a time, the activations pass from each to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit.calibration.activations import Activations
from quantkit.calibration.observe import Enough, Watched
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.memory import trim
from quantkit.models.entry import LayerCall, layer_calls, outside
from quantkit.models.rotating import ResidualBasis
from quantkit.models.structure import Structure
from quantkit.ranks import ALONE, Ranks

# Tokens per forward: enough to keep the cores busy, small enough that a layer's intermediates stay small.
_TOKENS_PER_BATCH = 2048
# There are at least so many batches, where there are as many samples: as many processes can then have a part of the
# samples, and still see the batches that one alone would.
_BATCHES = 8


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
        basis: what the residual stream is turned into; layers come turned, and so do the activations.
        ranks: the processes that the samples are split over; `tokens` are those of all.
        products: the type in which `run` and `advance` multiply matrices; all between layers stays float32.

    Attributes:
        hidden: the quantized layers' outputs so far, the next layer's inputs, float32 [samples, seqlen, width]; of
            this process's samples.
        hidden_reference: the same of the original layers, or None.
        first: the number of this process's first sample.
        batches: how many there are, of all processes.
        device, products: as given.
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
        basis: ResidualBasis | None = None,
        ranks: Ranks = ALONE,
        products: torch.dtype = torch.float32,
    ) -> None:
        self._basis = basis
        self.products = products
        self._checkpoint = checkpoint
        self._structure = structure
        self._layers: Any = skeleton.get_submodule(structure.layers)
        self.device = device
        # Batch size -> what each layer is called with: some models make masks and biases for each sequence.
        self._calls: dict[int, list[LayerCall]] = {}
        self._store = store or Activations(Path())
        self.hidden: torch.Tensor | None = None
        self.hidden_reference: torch.Tensor | None = None
        self.first = self.batches = 0
        if tokens is not None:
            self._batch = batch_size(tokens.shape[0], tokens.shape[1], ranks.size)
            self.batches = -(-len(tokens) // self._batch)
            self.first, last = (self._batch * n for n in ranks.span(self.batches))
            self._embed(skeleton, tokens[self.first : last], done)
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
        """Run the model up to its decoder layers: gives the first one's input, and what each is called with."""

        def value(name: str, parameter: nn.Parameter) -> torch.Tensor:
            if parameter is embedding.weight:
                return torch.empty(1, parameter.shape[1])  # rows come with the tokens
            return self._checkpoint.read(name, finite=True).float()

        base: Any = skeleton.base_model
        embedding = base.get_input_embeddings()
        name = next(n for n, m in skeleton.named_modules() if m is embedding)
        with outside(skeleton, self._structure.layers, value, self.device):
            for first in range(0, len(tokens), self._batch):
                batch = tokens[first : first + self._batch]
                if done and len(batch) in self._calls:
                    continue
                embedded = _rows(embedding, self._checkpoint, name, batch)
                hidden, calls = layer_calls(
                    skeleton, self._structure.layers, embedded.to(self.device)
                )
                self._calls.setdefault(len(batch), calls)
                if self._basis is not None:
                    # As it will be stored.
                    hidden = self._basis.turn(hidden).to(embedding.weight.dtype).float()
                if self.hidden is None:
                    shape = (*tokens.shape, hidden.shape[-1])
                    if done:
                        self.hidden = self._store.load(f"{done}-hidden", *shape)
                    else:
                        self.hidden = self._store.empty(*shape)
                if not done:
                    self.hidden[first : first + len(batch)] = hidden.to(self.hidden.device)
                    self._store.release()
            if 1 not in self._calls:
                embedded = _rows(embedding, self._checkpoint, name, tokens[:1]).to(self.device)
                self._calls[1] = layer_calls(skeleton, self._structure.layers, embedded)[1]

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """A decoder layer with its weights in float32 on the device; freed at the end, and not to be had again."""
        try:
            yield self._load(number)
        finally:
            # Linears may have been replaced by simulations: drop the whole module, not only its parameters.
            self._layers[number] = nn.Identity()
            trim()

    @contextmanager
    def original(self, number: int) -> Iterator[nn.Module]:
        """As `layer`, for a look: it must be left as it is, and can be had again."""
        layer = self._load(number)
        try:
            yield layer
        finally:
            layer.to("meta")
            trim()

    def _load(self, number: int) -> nn.Module:
        layer: nn.Module = self._layers[number]
        prefix = f"{self._structure.layers}.{number}."
        state = {
            name: self._checkpoint.read(prefix + name, finite=True).to(self.device, torch.float32)
            for name, _ in layer.named_parameters()
        }
        layer.load_state_dict(state, strict=True, assign=True)
        if self._basis is not None:
            self._basis.turn_layer(layer, self._structure.layer(number))
        return layer.requires_grad_(False)

    def forward(self, layer: nn.Module, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """A layer's outputs for some blocks of inputs [blocks, seqlen, width]."""
        if hidden.shape[0] in self._calls:
            hidden = hidden.to(self.device)
            try:
                return self._calls[hidden.shape[0]][number].run(layer, hidden)
            except Enough:
                return hidden
        return torch.cat([self.forward(layer, number, block) for block in hidden.split(1)])

    @torch.no_grad()
    def run(
        self,
        layer: nn.Module,
        number: int,
        sink: Callable[[int, torch.Tensor], None],
        hidden: torch.Tensor | None = None,
        *,
        watched: Watched | None = None,
        outputs: int = 0,
    ) -> None:
        """Run each block through a layer; `sink(first, output)` gets the outputs of blocks first, first + 1, ...

        The inputs are the stream's, or `hidden`. With `watched`, only blocks before `outputs` are sure to give theirs: the
        others end where all is seen that is to be seen.
        """
        hidden = self.hidden if hidden is None else hidden
        assert hidden is not None
        narrow = self.products != torch.float32
        for first in range(0, hidden.shape[0], self._batch):
            cut = watched is not None and first >= outputs and watched.may_end_early()
            with torch.autocast(self.device.type, self.products, enabled=narrow):
                output = self.forward(layer, number, hidden[first : first + self._batch])
            if not cut:
                sink(first, output.float())
            self._store.release()

    def advance(self, layer: nn.Module, number: int, blocks: int | None = None) -> None:
        """The layer's outputs become the next layer's inputs, in place; of the first `blocks`, at least, or all."""
        assert self.hidden is not None
        if blocks is not None:
            blocks = -(-blocks // self._batch) * self._batch
        self._advance(layer, number, self.hidden[:blocks])

    def advance_reference(self, layer: nn.Module, number: int) -> None:
        """As `advance`, for the original layer and `hidden_reference`."""
        assert self.hidden_reference is not None
        self._advance(layer, number, self.hidden_reference)

    def _advance(self, layer: nn.Module, number: int, hidden: torch.Tensor) -> None:
        def replace(first: int, output: torch.Tensor) -> None:
            hidden[first : first + output.shape[0]] = output.to(hidden.device)

        self.run(layer, number, replace, hidden)


def batch_size(samples: int, seqlen: int, processes: int = 1) -> int:
    """How many samples go through a layer together; there are at least as many batches as processes.

    Raises:
        QuantkitError: there are not as many samples.
    """
    if samples < processes:
        raise QuantkitError(
            f"{samples} calibration samples cannot be split over {processes} processes; start fewer, or use more --samples"
        )
    return max(1, min(_TOKENS_PER_BATCH // seqlen, samples // max(processes, _BATCHES)))


def _rows(embedding: Any, checkpoint: Checkpoint, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """What an input embedding gives for tokens; only the rows that occur are read."""
    wanted, place = tokens.unique(return_inverse=True)
    kept, embedding.padding_idx = embedding.padding_idx, None  # it counts rows of the whole table
    embedding.weight = nn.Parameter(
        checkpoint.gather(f"{name}.weight", wanted), requires_grad=False
    )
    found: torch.Tensor = embedding(place).float()
    embedding.padding_idx = kept
    return found
