"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantkit.formats.bits import pack, unpack
from quantkit.formats.packed import expected_tensors
from quantkit.formats.scheme import ActivationFormat, Scheme
from quantkit.kernels import gpu_layout, int4pack
from quantkit.kernels.dispatch import Op, runs_triton
from quantkit.kernels.hadamard import hadamard
from quantkit.kernels.hadamard_int4_linear import hadamard_int4_linear
from quantkit.kernels.hadamard_quantize import hadamard_quantize
from quantkit.kernels.int4_fp8_linear import int4_fp8_linear
from quantkit.kernels.int4_int8_linear import int4_int8_linear
from quantkit.kernels.int4_linear import int4_linear
from quantkit.kernels.int8_linear import int8_linear
from quantkit.kernels.wide_linear import wide_linear
from quantkit.runtime.activations import Quantized, form_name, quantize_activation

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
        # Whether codes of other than four bits are in the form that the ops take.
        self._expanded = False
        for name, (dtype, shape) in expected_tensors(scheme, out_features, in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=_DTYPES[dtype], device="meta"))
        self.register_buffer("bias", torch.empty(out_features, device="meta") if bias else None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`model.to(dtype)` is for activations: codes and scales keep their types."""

        def keeping(tensor: torch.Tensor) -> torch.Tensor:
            moved: torch.Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keeping, recurse)

    @property
    def packed(self) -> torch.Tensor:
        """The weight as the op takes it."""
        weights = self.scheme.weights
        if not self.scheme.packs:
            return self.weight
        if weights.bits == 4 or self._expanded:
            return self.weight_packed
        return _expand(self.weight_packed, weights.bits, self.in_features)

    @property
    def op(self) -> Op:
        """The op that this layer runs; its `backend` says which implementation that is."""
        acts = self.scheme.activations
        if self.scheme.weights.bits > 4:
            return int8_linear if _is_int8(self.scheme) else wide_linear
        if self.scheme.weights.half:
            return hadamard_int4_linear if self.scheme.rotation else int4_int8_linear
        if acts is None:
            return int4_linear
        if acts.type == "float":
            return int4_fp8_linear
        return int4_int8_linear

    def prepare(self) -> None:
        """Repack the weight for the device it is on, where that has a layout of its own; once, after loading."""
        if not self.scheme.packs or self.weight_packed.dtype != torch.int32:
            return
        if self.scheme.weights.bits != 4 and not self._expanded:
            self.weight_packed, self._expanded = self.packed, True
        if self.scheme.weights.bits > 4:
            return
        weight, scale, half = self.weight_packed, self.weight_scale, self.scheme.weights.half
        if runs_triton(weight.device):
            repacked = gpu_layout.repack(weight, scale, self._operand_dtype)
        else:
            repacked = int4pack.repack(weight, scale, half)
        if repacked is not None:
            self.weight_packed, self.weight_scale = repacked

    @property
    def _operand_dtype(self) -> torch.dtype:
        """The dtype of the activations in the product."""
        acts = self.scheme.activations
        if acts is None:
            return torch.bfloat16
        return torch.float8_e4m3fn if acts.type == "float" else torch.int8

    @property
    def input_form(self) -> ActivationFormat | None:
        """The format in which the product takes its input, or None if it wants the input itself."""
        rotated = self.scheme.rotation is not None
        return None if rotated or self.op is wide_linear else self.scheme.activations

    def product(
        self,
        x: Quantized,
        dtype: torch.dtype,
        gate: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's output in `dtype` for an input that is quantized already.

        Args:
            gate: silu(first half) * second half of the outputs, for the ops that know it.
            residual: [..., out_features], added to the output, or None.
        """
        output: torch.Tensor = self.op(
            *(x.codes, x.scale, self.packed, self.weight_scale, self.bias, dtype),
            **({"half": True} if self.scheme.weights.half else {}),
            **({"gate": True} if gate else {}),
            **({} if residual is None else {"residual": residual}),
        )
        return output

    def arguments(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[object, ...]:
        """The op's arguments for an input [..., K], with a bias in the place of the layer's own if one is given."""
        scheme, acts = self.scheme, self.scheme.activations
        bias = self.bias if bias is None else bias
        if self.op is wide_linear:
            rest = (self.packed, self.weight_scale, bias, x.dtype, scheme.weights.half)
            return (*self._values(x), *rest)
        if self.op is hadamard_int4_linear:
            assert acts is not None
            return (x, self.packed, self.weight_scale, bias, acts.bits, scheme.rotation)
        if acts is None:
            return (self._rotated(x), self.packed, self.weight_scale, bias)
        codes, scale = self._quantized(x, acts)
        half = (True,) if scheme.weights.half else ()
        return (codes, scale, self.packed, self.weight_scale, bias, x.dtype, *half)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        rotation = self.scheme.rotation
        return x if rotation is None else hadamard(x, rotation)

    def _quantized(
        self, x: torch.Tensor, form: ActivationFormat
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scale of the input, rotated in float32 where it is."""
        rotation = self.scheme.rotation
        if rotation is None:
            return quantize_activation(x, form)
        return hadamard_quantize(x, form_name(form), form.bits, rotation)

    def _values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `wide_linear` takes first: the codes' values and step, or the input itself and None."""
        acts = self.scheme.activations
        if acts is None:
            return self._rotated(x), None
        codes, step = self._quantized(x, acts)
        # An e4m3 number, and n + 1/2 of up to eight bits, are exact in bf16.
        values = codes.to(torch.float32 if x.dtype == torch.float32 else torch.bfloat16)
        return values + 0.5 if acts.half else values, step

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The output [..., out_features], with `residual` of that shape added where one is given."""
        added = {} if residual is None else {"residual": residual}
        output: torch.Tensor = self.op(*self.arguments(x), **added)
        return output

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}"


def _is_int8(scheme: Scheme) -> bool:
    """Whether the INT8 product takes codes of five to eight bits: one scale per row, INT8 activations."""
    acts, weights = scheme.activations, scheme.weights
    plain = weights.group_size is None and not weights.half and acts is not None and not acts.half
    return plain and acts is not None and acts.type == "int"


def _expand(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes as stored -> as the ops take them: two and three bits among those of four, more as bytes."""
    codes = unpack(packed, bits, columns)
    return pack(codes, 4) if bits < 4 else codes


def stack(linears: list[QuantLinear]) -> QuantLinear:
    """One layer with the outputs of several, in their order; they have one scheme and one input.

    The originals are emptied: their memory is free once this returns.
    """
    first = linears[0]
    outputs = sum(linear.out_features for linear in linears)
    biased = any(linear.bias is not None for linear in linears)
    joined = QuantLinear(first.in_features, outputs, biased, first.scheme)
    for name in ("weight_packed", "weight", "weight_scale"):
        parts = [linear._buffers[name] for linear in linears if name in linear._buffers]
        if parts:
            setattr(joined, name, torch.cat(parts))  # type: ignore[arg-type]
    if "weight_shape" in joined._buffers:
        joined.weight_shape = torch.tensor([outputs, first.in_features])
    if biased:
        scale = first.weight_scale
        joined.bias = torch.cat(
            [
                torch.zeros(linear.out_features, device=scale.device)
                if linear.bias is None
                else linear.bias
                for linear in linears
            ]
        )
    for linear in linears:
        linear._buffers.clear()
    return joined
