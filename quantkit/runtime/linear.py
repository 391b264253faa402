"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

import torch
from torch import nn

from quantkit.formats.packed import expected_tensors
from quantkit.formats.scheme import Scheme
from quantkit.kernels.dispatch import Op
from quantkit.kernels.hadamard import hadamard
from quantkit.kernels.hadamard_int4_linear import hadamard_int4_linear
from quantkit.kernels.int4_fp8_linear import int4_fp8_linear
from quantkit.kernels.int4_int8_linear import int4_int8_linear
from quantkit.kernels.int4_linear import int4_linear
from quantkit.kernels.int4pack import repack
from quantkit.kernels.int8_linear import int8_linear
from quantkit.runtime.activations import quantize_activation

_DTYPES = {"I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "BF16": torch.bfloat16}


class QuantLinear(nn.Module):
    """Stands for an nn.Linear; its buffers have the names and shapes of the checkpoint.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        scheme: the numeric format; it decides which op runs.
    """

    weight: torch.Tensor
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for name, (dtype, shape) in expected_tensors(scheme, out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=_DTYPES[dtype], device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)

    @property
    def packed(self) -> torch.Tensor:
        """The weight as the op takes it."""
        return self.weight_packed if self.scheme.weights.bits == 4 else self.weight

    @property
    def op(self) -> Op:
        """The op that this layer runs; its `backend` says which implementation that is."""
        acts = self.scheme.activations
        if self.scheme.weights.half:
            return hadamard_int4_linear
        if acts is None:
            return int4_linear
        if acts.type == "float":
            return int4_fp8_linear
        return int8_linear if self.scheme.weights.bits == 8 else int4_int8_linear

    def prepare(self) -> None:
        """Repack the weight for the device it is on, where that has a layout of its own; once, after loading."""
        if self.scheme.weights.bits != 4:
            return
        repacked = repack(self.weight_packed, self.weight_scale, self.scheme.weights.half)
        if repacked is not None:
            self.weight_packed, self.weight_scale = repacked

    def arguments(self, x: torch.Tensor) -> tuple[object, ...]:
        """The op's arguments for an input [..., K]."""
        scheme, acts = self.scheme, self.scheme.activations
        if scheme.weights.half:
            assert acts is not None
            assert scheme.rotation is not None
            return (x, self.packed, self.weight_scale, self.bias, acts.bits, scheme.rotation)
        if scheme.rotation:
            x = hadamard(x, scheme.rotation)
        if acts is None:
            return (x, self.packed, self.weight_scale, self.bias)
        codes, scale = quantize_activation(x, acts)
        return (codes, scale, self.packed, self.weight_scale, self.bias, x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.op(*self.arguments(x))
        return output

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}"
