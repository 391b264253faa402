"""A mixture's experts in vLLM on quantkit's kernels, an expert after the other, on a CPU.

vLLM's own CPU kernels for quantized experts want AMX, and the one for INT4 rounds activations to INT8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from quantkit.errors import QuantkitError
from quantkit.formats.packed import expected_tensors
from quantkit.formats.scheme import Scheme
from quantkit.integrations.vllm.kernels import check_split
from quantkit.integrations.vllm.linear import blank_tensors, packed_linear
from quantkit.runtime.linear import QuantLinear

_GATES: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: functional.silu,
    MoEActivation.GELU: functional.gelu,
    MoEActivation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


class QuantkitExpertsMethod(FusedMoEMethodBase):
    """The checkpoint's tensors become two `QuantLinear`s for each of a rank's experts: gate with up, and down.

    Args:
        moe: vLLM's description of the experts.
        schemes: `w13` and `w2`, vLLM's names for gate with up and for down -> their scheme.
        prefix: the layer's name.

    Raises:
        QuantkitError: experts with biases or a gate that is not known here.
    """

    def __init__(self, moe: FusedMoEConfig, schemes: Mapping[str, Scheme], prefix: str) -> None:
        super().__init__(moe)
        self.schemes, self.prefix = schemes, prefix
        if moe.has_bias or moe.activation not in _GATES:
            what = "biases" if moe.has_bias else f"the gate {moe.activation.value}"
            raise QuantkitError(
                f"{prefix}: quantized experts with {what} are not served by vLLM here; use quantkit.load"
            )

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        width = intermediate_size_per_partition
        self.shapes = {"w13": (2 * width, hidden_size), "w2": (hidden_size, width)}
        whole = width * self.moe.moe_parallel_config.tp_size
        check_split(f"{self.prefix}.down_proj", self.schemes["w2"], whole, width)
        for part, (rows, columns) in self.shapes.items():
            scheme = self.schemes[part]
            kind = "channel" if scheme.weights.group_size is None else "group"
            for name, data in blank_tensors(scheme, rows, columns).items():
                stacked = data.expand(num_experts, *data.shape).clone()
                parameter = torch.nn.Parameter(stacked, requires_grad=False)
                layer.register_parameter(f"{part}_{name}", parameter)
                loader = extra["weight_loader"]
                set_weight_attrs(parameter, {"weight_loader": loader, "quant_method": kind})

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        found: dict[str, list[QuantLinear]] = {}
        for part, (rows, columns) in self.shapes.items():
            scheme = self.schemes[part]
            tensors = {
                name: layer._parameters.pop(f"{part}_{name}").data  # type: ignore[union-attr]
                for name in expected_tensors(scheme, rows, columns)
            }
            found[part] = [
                packed_linear(
                    f"{self.prefix}.{expert}.{part}",
                    scheme,
                    rows,
                    columns,
                    {name: data[expert].clone() for name, data in tensors.items()},
                )
                for expert in range(self.moe.num_local_experts)
            ]
        experts: Any = layer
        experts.quantkit_experts = list(zip(found["w13"], found["w2"], strict=True))

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        return None  # for vLLM's kernels

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [T, H], weights and experts' numbers [T, k] -> [T, H]: of this rank's experts, and its part of each."""
        ids = topk_ids.long()
        if layer.expert_map is not None:
            ids = layer.expert_map.long()[ids]  # -1: on another rank
        gate_of = _GATES[self.moe.activation]
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            if expert < 0:
                continue
            token, choice = (ids == expert).nonzero(as_tuple=True)
            weight = topk_weights[token, choice, None].to(x.dtype)
            into, down = layer.quantkit_experts[expert]
            rows = x[token] * weight if layer.apply_router_weight_on_input else x[token]
            gate, up = into.op(*into.arguments(rows, None)).chunk(2, dim=-1)
            hidden = gate_of(gate) * up
            y = down.op(*down.arguments(hidden, None))
            out.index_add_(0, token, y if layer.apply_router_weight_on_input else y * weight)
        return out
