"""The refinement of a quantized decoder layer: rounding, scales and norms learned against the original's outputs.

After GPTQ each linear on its own is nearly as good as it can be; what is left is how their errors meet in the layer's
output, and what the layers before have done. So the layer is run as a whole on the inputs that the quantized layers
before it give, its output is compared with what the *original* model has at this place, and rounding offsets,
scales and norms follow the gradient.

Source: SignRound / AutoRound (arXiv 2309.05516) for learned rounding per decoder layer, OmniQuant (arXiv 2308.13137)
and Norm Tweaking (arXiv 2309.02784) for what is learned beside it. Ours are the start from GPTQ's codes and the
metric (calibration/curvature.py), which take most of the steps away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibration.simulate import SimulatedLinear
from quantkit.formats.scheme import Scheme
from quantkit.methods.hadamard import rotate
from quantkit.methods.learned_rounding import encode_with_offset, round_with_offset
from quantkit.methods.rounding import Grid, dequantize, expand
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import Refine
from quantkit.runtime.activations import round_activation
from quantkit.solve import Solved, store_scale

# Share of the blocks that nothing is learned from: they say which step was the best, the start among them.
_HELD_OUT = 1 / 16
# How often they are asked.
_CHECKS = 4
_BLOCKS_PER_CHECK = 4
# Adam's, for few steps: the mean of the squares must settle within a hundred of them.
_BETAS = (0.9, 0.99)
# The rate of scales and norms (relative changes), as a share of that of offsets (in units of a level).
_SCALE_RATE = 0.05


@dataclass(frozen=True)
class Task:
    """What a decoder layer is refined against.

    Attributes:
        forward: the layer's function, [blocks, seqlen, width] -> the same, on the layer's device.
        inputs: what the quantized layers before it give, float32 [samples, seqlen, width].
        targets: what the original model has at the layer's output, likewise.
        root: float32 [width, width], see calibration/curvature.py, or None: the relative squared error then.
        products: the type in which the steps multiply matrices; what is held out is always measured in float32.
        first: the number of this process's first block.
        ranks: the processes that the blocks are split over; losses and gradients are over all of them.
    """

    forward: Callable[[Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    root: Tensor | None = None
    products: torch.dtype = torch.float32
    first: int = 0
    ranks: Ranks = ALONE

    @cached_property
    def blocks(self) -> int:
        """How many blocks there are, of all processes."""
        return sum(self.ranks.everyones(len(self.inputs)))

    def own(self, blocks: Tensor) -> Tensor:
        """Of some blocks, those that this process has, as its own indices."""
        return (
            blocks[(blocks >= self.first) & (blocks < self.first + len(self.inputs))] - self.first
        )

    def loss(self, blocks: Tensor, device: torch.device) -> Tensor:
        """Mean over the tokens of some of this process's blocks: nats where the curvature is known."""
        want = self.targets[blocks].to(device)
        error = self.forward(self.inputs[blocks].to(device)) - want
        error = error / want.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
        if self.root is None:
            return error.square().mean()
        return (error @ self.root.to(device)).square().sum(-1).mean() / 2

    @torch.no_grad()
    def held_out_loss(self, device: torch.device) -> float:
        """The loss on the blocks that are not learned from."""
        blocks = self.own(torch.arange(self.learned_from, self.blocks)).split(_BLOCKS_PER_CHECK)
        total = sum(float(self.loss(part, device)) * len(part) for part in blocks if len(part))
        return sum(self.ranks.everyones(total)) / (self.blocks - self.learned_from)

    def gradients(
        self, blocks: Tensor, parameters: Sequence[Tensor], device: torch.device
    ) -> list[Tensor | None]:
        """Of the mean loss over some blocks; None for what none of them reaches (an expert)."""
        own = self.own(blocks)
        found: list[Tensor | None] = [None] * len(parameters)
        if len(own):
            narrow = self.products != torch.float32
            with torch.autocast(device.type, self.products, enabled=narrow):
                loss = self.loss(own, device) * (len(own) / len(blocks))
            found = [*torch.autograd.grad(loss, parameters, allow_unused=True)]
        reached = torch.tensor([gradient is not None for gradient in found], dtype=torch.int32)
        self.ranks.total(reached)
        for n in reached.nonzero().flatten().tolist():
            gradient = found[n] = torch.zeros_like(parameters[n]) if found[n] is None else found[n]
            assert gradient is not None
            self.ranks.total(gradient)
        return found

    @property
    def learned_from(self) -> int:
        """How many blocks, from the first, are learned from; a single one is both."""
        return max(self.blocks - max(1, round(self.blocks * _HELD_OUT)), 0)


class LearnedLinear(nn.Module):
    """A simulated linear whose rounding offsets and scales are learned; at first it computes what it starts from."""

    def __init__(self, start: Solved, bias: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.grid = Grid(scheme.weights.bits, scheme.weights.half)
        assert start.target is not None
        self.target, self.start = start.target.float().contiguous(), start.scale.float()
        self.offset = nn.Parameter(torch.zeros_like(self.target))
        self.stretch = nn.Parameter(torch.zeros_like(self.start))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def scale(self) -> Tensor:
        """The scales as they would be stored."""
        wanted = self.start * self.stretch.exp()
        return _straight_through(
            wanted, store_scale(wanted.detach(), self.target, self.scheme.weights)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.rotation:
            x = rotate(x, self.scheme.rotation)
        if self.scheme.activations:
            x = _straight_through(x, round_activation(x.detach(), self.scheme.activations))
        weight = round_with_offset(self.target, self.scale(), self.offset, self.grid)
        return nn.functional.linear(x, weight, self.bias)

    @torch.no_grad()
    def solved(self) -> Solved:
        """What was learned, as it is stored."""
        scale = self.scale()
        codes = encode_with_offset(self.target, scale, self.offset, self.grid)
        moved = self.offset * expand(scale, self.target.shape[1])
        return Solved(codes, scale, self.target + moved)


class LearnedNorm(nn.Module):
    """A norm whose weight is learned, as its stored type can hold it."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        # Not a sub-module: its weight is not what is learned.
        self.__dict__["norm"] = norm
        self.dtype = dtype
        start: Any = norm.weight
        self.start = start.detach().clone()
        self.stretch = nn.Parameter(torch.zeros_like(self.start))

    def weight(self) -> Tensor:
        wanted = self.start * (1 + self.stretch)
        return _straight_through(wanted, wanted.detach().to(self.dtype).to(wanted.dtype))

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        output: Tensor = torch.func.functional_call(norm, {"weight": self.weight()}, (x,))
        return output


def refine_layer(
    layer: nn.Module,
    solved: dict[str, Solved],
    schemes: dict[str, Scheme],
    norms: tuple[str, ...],
    norm_dtype: torch.dtype,
    task: Task,
    settings: Refine,
) -> tuple[dict[str, Solved], dict[str, Any]]:
    """Let a layer of simulated linears learn; the simulations are replaced, norms and biases changed in place.

    The order of the blocks is drawn from torch's default generator.

    Args:
        solved: linear's name within the layer -> where it starts.
        norms: names of the norms that may learn too (weight * normalised input).
        norm_dtype: the type norms are stored in.

    Returns:
        (what the linears are now, figures for the report: the held-out loss before and after, the share of codes
        that changed). No worse than the start on the blocks held out.
    """
    linears: dict[str, LearnedLinear] = {}
    for name, start in solved.items():
        bias: Any = layer.get_submodule(name).bias
        linears[name] = LearnedLinear(start, bias, schemes[name])
        _place(layer, name, linears[name])
    learned_norms: dict[str, LearnedNorm] = {}
    for name in norms if settings.norms else ():
        learned_norms[name] = LearnedNorm(layer.get_submodule(name), norm_dtype)
        _place(layer, name, learned_norms[name])
    modules: list[LearnedLinear | LearnedNorm] = [*linears.values(), *learned_norms.values()]
    before, after = _learn(modules, task, settings)

    found = {name: module.solved() for name, module in linears.items()}
    for name, module in linears.items():
        values = dequantize(found[name].codes, found[name].scale, module.grid)
        bias = module.bias
        if bias is not None:
            # Still a parameter: only those are written, whatever else has the bias's name is copied from the source.
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        _place(layer, name, SimulatedLinear(values, bias, module.scheme))
    for name, norm in learned_norms.items():
        original: Any = norm.norm
        original.weight.data.copy_(norm.weight().detach())
        _place(layer, name, original)
    changed = sum(int((found[n].codes != solved[n].codes).sum()) for n in found)
    codes = sum(s.codes.numel() for s in found.values())
    return found, {
        "before": before,
        "after": after,
        "unit": "nats" if task.root is not None else "relative squared error",
        "changed_codes": changed / codes,
    }


def _learn(
    modules: list[LearnedLinear | LearnedNorm], task: Task, settings: Refine
) -> tuple[float, float]:
    """The held-out loss before and after; the modules' parameters are those of the best check."""
    rates = {p: rate * settings.rate for m in modules for p, rate in _rates(m)}
    parameters = list(rates)
    device = parameters[0].device
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rate} for p, rate in rates.items()],
        betas=_BETAS,
        eps=1e-20,
        fused=True,
    )
    # The last step is the smallest: rounding must come to rest.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / settings.steps)
    first = best = task.held_out_loss(device)
    kept = [p.detach().clone() for p in parameters]
    batches = _batches(max(task.learned_from, 1), settings)
    with torch.enable_grad():
        for step, blocks in enumerate(batches, 1):
            gradients = task.gradients(blocks, parameters, device)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            optimizer.step()
            # Before the next ones are there: each is as large as the layer.
            optimizer.zero_grad()
            del gradients
            schedule.step()
            if step % max(1, settings.steps // _CHECKS) == 0 or step == settings.steps:
                now = task.held_out_loss(device)
                if now < best:
                    best, kept = now, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept):
            parameter.copy_(value)
    return first, best


def _rates(module: LearnedLinear | LearnedNorm) -> Iterator[tuple[nn.Parameter, float]]:
    """Parameters and their rates, in units of the offsets'."""
    yield module.stretch, _SCALE_RATE
    if isinstance(module, LearnedLinear):
        yield module.offset, 1.0
        if module.bias is not None:
            yield module.bias, _SCALE_RATE * float(module.bias.detach().square().mean().sqrt())


def _batches(blocks: int, settings: Refine) -> Iterator[Tensor]:
    """Indices of the blocks of each step: all of them in a drawn order, then in another."""
    order = torch.empty(0, dtype=torch.int64)
    size = min(settings.blocks, blocks)
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.randperm(blocks)
        batch, order = order[:size], order[size:]
        yield batch


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of x."""
    return x + (rounded - x).detach()


def _place(layer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, module)
