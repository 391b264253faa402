"""How much an error in a layer's output costs: the curvature of the model's own prediction there.

To second order, an error e in the residual stream changes the prediction by a divergence of 1/2 e^T F e nats, F being
the Fisher information E[g g^T] of the stream, g the gradient of the log-likelihood of tokens drawn from the model
itself. Streams differ in size from token to token and the norms that read them divide it out, so here both
are relative: F = E[r^2 g g^T] for errors e / r, r the root mean square of the token's stream.

Source: the Fisher information as a metric of compression is Hassibi and Stork's (Optimal Brain Surgeon, 1993) and,
with sampled labels, Martens and Grosse's (K-FAC, arXiv 1503.05671); that it be one matrix per layer is ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantkit.calibration.activations import Activations
from quantkit.calibration.stream import LayerStream
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.rotating import ResidualBasis
from quantkit.models.structure import Structure

Forward = Callable[[Tensor], Tensor]
# Blocks of text that it is measured on.
BLOCKS = 16
# Tokens whose logits are in memory at a time.
TOKENS = 512

# Share of the mean eigenvalue added to all: directions that the few tokens seen did not need may matter to others.
_RIDGE = 0.1


def output_curvature(
    checkpoint: Checkpoint,
    skeleton: Any,
    structure: Structure,
    tokens: Tensor,
    device: torch.device,
    folder: Path,
    seed: int = 0,
    basis: ResidualBasis | None = None,
) -> bool:
    """Per decoder layer a root C float32 [width, width] of its output's curvature: 1/2 |e / r C|^2 is in nats.

    Runs the original model once forwards and once backwards over some blocks, a layer in memory at a time. Those blocks'
    hidden states at every layer are in mapped files, and so are the roots in the end: `read_root` gives them.

    Args:
        skeleton: with its parameters on the meta device; it is left so.
        tokens: int64 [samples, seqlen]; the first blocks are used.
        folder: for the files.
        basis: what errors are given in, where the residual stream is turned.

    Returns:
        Whether it is known: not where the model's end is no norm and linear.

    Raises:
        OSError: the disk has no room.
    """
    store = Activations(folder, offload=True)
    stream = LayerStream(checkpoint, skeleton, structure, tokens[:BLOCKS], device, store=store)
    assert stream.hidden is not None
    hidden = [stream.hidden]
    for number in range(structure.num_layers):
        outputs = store.empty(*stream.hidden.shape)
        with stream.original(number) as layer, torch.no_grad():
            for n, block in enumerate(hidden[-1].split(1)):
                outputs[n] = stream.forward(layer, number, block)[0]
        hidden.append(outputs)
        store.release()
    with _head(checkpoint, skeleton, structure, device) as head:
        if head is None:
            return False
        gradient = _at_the_end(head, hidden[-1], device, seed)
    for number in reversed(range(structure.num_layers)):
        # Of the layer's output, and so of the next one's input.
        root = _root(hidden[number + 1], gradient)
        # |e C| = |turn(e) C'| for C' = R^T C.
        _write_root(folder, number, basis.turn(root.T).T if basis else root)
        if number:
            with stream.original(number) as layer:
                forward = partial(stream.forward, layer, number)
                gradient = _through(forward, hidden[number], gradient, device)
        store.release()
    return True


def _write_root(folder: Path, number: int, root: Tensor) -> None:
    """Safe on the disk: a run that is gone on with relies on it."""
    path = _root_file(folder, number)
    save_file({"root": root.contiguous()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_root(folder: Path, number: int) -> Tensor:
    """What `output_curvature` left for a decoder layer."""
    return load_file(_root_file(folder, number))["root"]


def _root_file(folder: Path, number: int) -> Path:
    return folder / f"curvature-{number}.safetensors"


@contextmanager
def _head(
    checkpoint: Checkpoint, skeleton: Any, structure: Structure, device: torch.device
) -> Iterator[Callable[[Tensor], Tensor] | None]:
    """The function from the last layer's outputs to logits."""
    base = skeleton.get_submodule(structure.layers.rpartition(".")[0])
    norm, output = getattr(base, "norm", None), skeleton.get_output_embeddings()
    if norm is None or output is None:
        yield None
        return
    names = {id(module): name for name, module in skeleton.named_modules()}
    for module, tied in ((norm, norm), (output, base.get_input_embeddings())):
        for kind, _ in list(module.named_parameters()):
            name = f"{names[id(module)]}.{kind}"
            if name not in checkpoint.tensors:
                name = f"{names[id(tied)]}.{kind}"
            value = checkpoint.load(name, finite=True).to(device, torch.float32)
            setattr(module, kind, nn.Parameter(value, requires_grad=False))
    try:
        yield lambda hidden: output(norm(hidden))  # type: ignore[no-any-return]
    finally:
        norm.to("meta")
        output.to("meta")


@torch.enable_grad()
def _at_the_end(head: Forward, hidden: Tensor, device: torch.device, seed: int) -> Tensor:
    """The gradient of the log-likelihood of drawn tokens with respect to the last layer's output."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for block in hidden.flatten(0, -2).split(TOKENS):
        x = block.to(device).requires_grad_()
        logits = head(x).float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
        loss = nn.functional.cross_entropy(logits, drawn[:, 0].to(x.device), reduction="sum")
        found.append(torch.autograd.grad(loss, x)[0].to(hidden.device))
    return torch.cat(found).view_as(hidden)


@torch.enable_grad()
def _through(forward: Forward, hidden: Tensor, gradient: Tensor, device: torch.device) -> Tensor:
    """The gradient with respect to a layer's inputs, from that with respect to its outputs."""
    found = []
    for block, above in zip(hidden.split(1), gradient.split(1)):
        x = block.to(device).requires_grad_()
        out = forward(x)
        found.append(torch.autograd.grad(out, x, above.to(out.device))[0].to(hidden.device))
    return torch.cat(found)


def _root(hidden: Tensor, gradient: Tensor) -> Tensor:
    size = hidden.square().mean(-1, keepdim=True).sqrt()
    rows = (gradient * size).flatten(0, -2)
    values, vectors = torch.linalg.eigh((rows.T @ rows / rows.shape[0]).double())
    values = values.clamp_min(0) + _RIDGE * values.mean()
    return (vectors * values.sqrt()).float()
