"""A quantized linear as calibration runs it: the packed weight's values in float32, activations rounded."""

from __future__ import annotations

import torch
from torch import nn

from quantkit.formats.scheme import Scheme
from quantkit.methods.hadamard import rotate
from quantkit.runtime.activations import round_activation


class SimulatedLinear(nn.Module):
    """Computes what `runtime.linear.QuantLinear` computes, without packing.

    Args:
        weight: dequantized, float32 [N, K], already rotated if the scheme rotates.
        bias: [N] or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.scheme = scheme

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scheme.rotation:
            x = rotate(x, self.scheme.rotation)
        x = round_activation(x, self.scheme.activations)
        return nn.functional.linear(x, self.weight, self.bias)
