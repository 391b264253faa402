"""Other tools' kernels on the same sizes, where they are installed; nothing here needs them.

Each way is made from the bf16 weights by the tool's own functions. One that is not installed is passed
over in silence; one that is and fails is named with its reason.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from quantkit.bench.timing import Run

Maker = Callable[[torch.Tensor, list[torch.Tensor]], Run]


def linear(
    op: str, x: torch.Tensor, weights: list[torch.Tensor]
) -> tuple[dict[str, Run], list[str]]:
    """(peer -> call, reasons of those that failed) for x [M, K] bf16 and copies of a weight [N, K] bf16."""
    return _made(_LINEARS.get(op, {}), x, weights)


def rows(op: str, x: list[torch.Tensor]) -> tuple[dict[str, Run], list[str]]:
    """The same for an op on rows, of which there are copies."""
    return _made(_ROWS.get(op, {}), x[0], x)


def _made(
    makers: dict[str, Maker], x: torch.Tensor, data: list[torch.Tensor]
) -> tuple[dict[str, Run], list[str]]:
    made: dict[str, Run] = {}
    failed = []
    for name, make in makers.items():
        if importlib.util.find_spec(name.split()[0].replace("-", "_")) is None:
            continue
        try:
            run = torch.inference_mode()(make(x, data))
            run(0)
            made[name] = run
        except Exception as error:  # another tool's, on sizes or devices it may not take
            failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return made, failed


def _torchao_int4(x: torch.Tensor, weights: list[torch.Tensor]) -> Run:
    """torch's own INT4 products, which torchao's other formats replace by packages of their own."""
    if x.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False)
        return _torchao(x, weights, config)
    from torchao.quantization import Int4WeightOnlyConfig

    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    return _torchao(x, weights, config)


def _torchao_int8(x: torch.Tensor, weights: list[torch.Tensor]) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(x, weights, Int8DynamicActivationInt8WeightConfig())


def _torchao(x: torch.Tensor, weights: list[torch.Tensor], config: Any) -> Run:
    """Compiled, since torchao's quantization of activations is plain torch."""
    from torchao.quantization import quantize_

    linears = []
    for weight in weights:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        quantize_(linear, config)
        linears.append(linear)
    call = torch.compile(lambda linear, x: linear(x), dynamic=False)
    return lambda i: call(linears[i % len(linears)], x)


def _vllm_marlin(x: torch.Tensor, weights: list[torch.Tensor]) -> Run:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        marlin_make_workspace_new,
    )
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    gemm = getattr(ops, "marlin_gemm", None) or ops.gptq_marlin_gemm
    known = inspect.signature(gemm).parameters
    packed = [marlin_quantize(weight.t(), kind, 128, False)[1:5] for weight in weights]
    (m, k), n = x.shape, len(weights[0])
    fixed = {
        "a": x, "c": None, "b_bias": None, "a_scales": None, "global_scale": None, "b_zeros": None,
        "workspace": marlin_make_workspace_new(x.device), "b_q_type": kind,
        "size_m": m, "size_n": n, "size_k": k, "use_fp32_reduce": True,
    }  # fmt: skip
    fixed = {name: value for name, value in fixed.items() if name in known}

    def run(i: int) -> object:
        weight, scales, g_idx, perm = packed[i % len(packed)]
        return gemm(b_q_weight=weight, b_scales=scales, g_idx=g_idx, perm=perm, **fixed)

    return run


def _vllm_machete(x: torch.Tensor, weights: list[torch.Tensor]) -> Run:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        pack_rows,
        quantize_weights,
    )
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4b8
    packed = []
    for weight in weights:
        _, codes, scales, _ = quantize_weights(weight.t(), kind, 128)
        words = pack_rows(codes, 4, *codes.shape).t().contiguous().t()
        packed.append((ops.machete_prepack_B(words, x.dtype, kind, scales.dtype), scales))

    def run(i: int) -> object:
        weight, scales = packed[i % len(packed)]
        return ops.machete_mm(a=x, b_q=weight, b_type=kind, b_group_scales=scales, b_group_size=128)

    return run


def _fast_hadamard(x: torch.Tensor, copies: list[torch.Tensor]) -> Run:
    from fast_hadamard_transform import hadamard_transform

    return lambda i: hadamard_transform(copies[i % len(copies)].view(-1, 128), 128**-0.5)


_INT4: dict[str, Maker] = {
    "torchao int4": _torchao_int4,
    "vllm marlin": _vllm_marlin,
    "vllm machete": _vllm_machete,
}
_LINEARS: dict[str, dict[str, Maker]] = {
    "int4_linear": _INT4,
    "int4_fp8_linear": _INT4,
    "int4_int8_linear": _INT4,
    "hadamard_int4_linear": _INT4,
    "int8_linear": {"torchao int8": _torchao_int8},
}
_ROWS: dict[str, dict[str, Maker]] = {"hadamard": {"fast-hadamard-transform": _fast_hadamard}}
