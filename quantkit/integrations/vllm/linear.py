"""Linear layers of vLLM whose format vLLM has no kernel for, on quantkit's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
import torch.distributed
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform

from quantkit.errors import QuantkitError
from quantkit.finite import all_finite
from quantkit.formats.packed import expected_tensors
from quantkit.formats.scheme import Scheme
from quantkit.integrations.vllm.kernels import check_split
from quantkit.runtime.activations import Quantized, quantize_activation
from quantkit.runtime.linear import QuantLinear

_DTYPES = {"I32": torch.int32, "I64": torch.int64, "I8": torch.int8, "BF16": torch.bfloat16}


def blank_tensors(scheme: Scheme, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """What a linear's files will fill, by last names; scales are NaN, so that one that none fills is found."""
    return {
        name: torch.full(shape, torch.nan if dtype == "BF16" else 0, dtype=_DTYPES[dtype])
        for name, (dtype, shape) in expected_tensors(scheme, rows, columns).items()
    }


def packed_linear(
    name: str, scheme: Scheme, rows: int, columns: int, tensors: Mapping[str, torch.Tensor]
) -> QuantLinear:
    """A linear of a checkpoint's tensors, by their last names, ready to run.

    Raises:
        QuantkitError: a scale is not a number, as where no file filled it.
    """
    linear = QuantLinear(columns, rows, False, scheme)
    linear._buffers.update(tensors)
    if not all_finite(linear.weight_scale):
        raise QuantkitError(
            f"{name}: a scale is missing or not a number; "
            "the checkpoint is damaged: copy or quantize it again"
        )
    linear.prepare()
    return linear


@register_weight_loader_v2_supported_method
class QuantkitLinearMethod(LinearMethodBase):
    """The checkpoint's tensors become a rank's share of a `QuantLinear`.

    Outputs are split over ranks, or inputs with their group scales; a fused layer (qkv, gate and up) has
    its parts' rows one after the other. Where inputs are split, each rank rounds its own part of a token by that part's
    maximum on a GPU, as vLLM's kernels do. On a CPU, where it is the numbers that count, ranks give what one alone would,
    if it is codes that are multiplied.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        check_split(
            str(getattr(layer, "prefix", "linear")),
            self.scheme,
            input_size,
            input_size_per_partition,
        )
        load: Callable[..., None] = extra["weight_loader"]
        rows = sum(output_partition_sizes)
        tensors = blank_tensors(self.scheme, rows, input_size_per_partition)
        for name, data in tensors.items():
            layer.register_parameter(
                name, self._parameter(name, data, input_size_per_partition, load)
            )
        own: Any = layer
        own.quantkit_shape = (rows, input_size_per_partition)
        own.quantkit_ranks = input_size // input_size_per_partition

    def _parameter(
        self, name: str, data: torch.Tensor, inputs: int, load: Callable[..., None]
    ) -> BasevLLMParameter:
        """The parameter whose class tells vLLM along which dimensions a rank's share is cut."""
        arguments: dict[str, Any] = {"data": data, "weight_loader": load}
        if name == "weight_packed":
            packed = Fraction(inputs, data.shape[1])
            return PackedvLLMParameter(
                input_dim=1, output_dim=0, packed_dim=1, packed_factor=packed, **arguments
            )
        if name == "weight":
            return ModelWeightParameter(input_dim=1, output_dim=0, **arguments)
        if name == "weight_scale":
            if self.scheme.weights.group_size is None:
                return ChannelQuantScaleParameter(output_dim=0, **arguments)
            return GroupQuantScaleParameter(input_dim=1, output_dim=0, **arguments)
        return BasevLLMParameter(**arguments)  # weight_shape: of the whole, not of a share

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        own: Any = layer
        rows, columns = own.quantkit_shape
        tensors = {
            name: layer._parameters.pop(name).data  # type: ignore[union-attr]
            for name in expected_tensors(self.scheme, rows, columns)
        }
        prefix = str(getattr(layer, "prefix", "linear"))
        layer.quantkit_linear = packed_linear(prefix, self.scheme, rows, columns, tensors)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        own: Any = layer
        linear: QuantLinear = own.quantkit_linear
        # Online rotations, and weights of more than four bits in groups, have ops that round by themselves.
        if own.quantkit_ranks > 1 and linear.input_form is not None and current_platform.is_cpu():
            return share_as_alone(linear, x, bias, own.quantkit_ranks)
        output: torch.Tensor = linear.op(*linear.arguments(x, bias))
        return output


def share_as_alone(
    linear: QuantLinear, x: torch.Tensor, bias: torch.Tensor | None, ranks: int
) -> torch.Tensor:
    """This rank's summand of a layer's output [..., N], where the ranks' sum is what one rank alone would give.

    An input is rounded by the largest number of the whole of it, and sums are added up before they are rounded. vLLM
    adds the ranks' outputs: each gives an equal part, which for a power of two of ranks is exact.
    """
    assert linear.input_form is not None
    largest = over_ranks(x.abs().amax(-1, keepdim=True), "MAX")
    # A column more, of the largest number of all: the scale is the whole row's.
    codes, scale = quantize_activation(torch.cat([x, largest], -1), linear.input_form)
    output = linear.product(Quantized(codes[..., :-1].contiguous(), scale), torch.float32)
    output = output if bias is None else output + bias
    return over_ranks(output, "SUM").to(x.dtype) / ranks


@torch.library.custom_op("quantkit::over_ranks", mutates_args=())
def over_ranks(x: torch.Tensor, how: str) -> torch.Tensor:
    """The largest (MAX) or the sum (SUM) of the ranks' tensors, added up in float32."""
    found = x.to(torch.float32, copy=True)
    _all_reduce(found, how)
    return found.to(x.dtype)


@over_ranks.register_fake
def _(x: torch.Tensor, how: str) -> torch.Tensor:
    return torch.empty_like(x)


def _all_reduce(x: torch.Tensor, how: str) -> None:
    operation = getattr(torch.distributed.ReduceOp, how)
    torch.distributed.all_reduce(x, operation, get_tp_group().device_group)
