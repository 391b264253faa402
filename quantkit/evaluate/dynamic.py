"""CrossQuant's own, dynamic form: for evaluation only, since no integer product can have it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantkit.methods.crossquant import fake_quantize_dynamic
from quantkit.methods.rounding import Grid, absmax_scale, dequantize, quantize
from quantkit.models.structure import build_skeleton, find_structure


@contextmanager
def dynamic_crossquant(
    model: Any, *, alpha: float = 0.15, weight_bits: int = 8, group_size: int | None = None
) -> Iterator[None]:
    """Within it, an original model computes as CrossQuant's paper evaluates: both roundings simulated.

    The column maxima come from the batch at hand, so a batch of one window is the paper's setting. Weights are
    rounded to nearest. Leaving restores the model.

    Args:
        model: as `quantkit.load` gives it for an unquantized checkpoint.
        alpha: the row maximum's exponent.
        weight_bits, group_size: of the weights; None is per channel.

    Source: CrossQuant, arXiv 2410.07505, equations 4 and 5.
    """
    grid = Grid(weight_bits)
    handles, originals = [], []
    skeleton = build_skeleton(model.config, "model")
    for name, _ in find_structure(skeleton, "model").modules():
        linear = model.get_submodule(name)
        originals.append((linear, linear.weight))
        weight = linear.weight.float()
        scale = absmax_scale(weight, group_size, grid)
        rounded = dequantize(quantize(weight, scale, grid), scale, grid).to(linear.weight.dtype)
        linear.weight = nn.Parameter(rounded, requires_grad=False)
        handles.append(linear.register_forward_pre_hook(_rounding(alpha)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for linear, weight in originals:
            linear.weight = weight


def _rounding(alpha: float) -> Any:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = args[0]
        rows = fake_quantize_dynamic(x.reshape(-1, x.shape[-1]), 8, alpha)
        return (rows.reshape(x.shape).to(x.dtype), *args[1:])

    return hook
