"""Quantized layers and checkpoints of random numbers: for speed, which does not depend on them."""

from __future__ import annotations

import torch

from quantkit.formats.packed import expected_tensors
from quantkit.formats.scheme import Scheme
from quantkit.runtime.linear import QuantLinear


def random_tensors(
    scheme: Scheme, rows: int, columns: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of a weight [rows, columns], about as large as a real layer's numbers are."""
    found: dict[str, torch.Tensor] = {}
    step = columns**-0.5 / (4 if scheme.weights.bits == 4 else 64)
    for suffix, (kind, shape) in expected_tensors(scheme, rows, columns).items():
        if kind == "I32":
            found[suffix] = torch.randint(
                -(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator
            )
        elif kind == "I8":
            found[suffix] = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        elif kind == "I64":
            found[suffix] = torch.tensor([rows, columns])
        else:
            found[suffix] = (torch.rand(shape, generator=generator) * step + step / 2).bfloat16()
    return found


def random_linear(
    inputs: int, outputs: int, scheme: Scheme, device: torch.device, seed: int = 0
) -> QuantLinear:
    """A layer ready to run."""
    linear = QuantLinear(inputs, outputs, False, scheme)
    generator = torch.Generator().manual_seed(seed)
    for suffix, tensor in random_tensors(scheme, outputs, inputs, generator).items():
        setattr(linear, suffix, tensor.to(device))
    linear.prepare()
    return linear
