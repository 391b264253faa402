"""torchao: its data-free configurations."""

from __future__ import annotations

from pathlib import Path

import torch
from common import INT8_TOKEN, INT8_TOKEN_ASYMMETRIC, Clock, Result, linears, load, main
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

INT4 = {"weight_dtype": torch.int4}
CONFIGS = {
    "intx:w4a16": lambda: IntxWeightOnlyConfig(**INT4, granularity=PerGroup(128)),
    "dynamic:w8a8": Int8DynamicActivationInt8WeightConfig,
    "dynamic-intx:w4a8-int": lambda: Int8DynamicActivationIntxWeightConfig(
        **INT4, weight_granularity=PerGroup(128)
    ),
}
ACTIVATIONS = {
    "intx:w4a16": None,
    "dynamic:w8a8": INT8_TOKEN,
    "dynamic-intx:w4a8-int": INT8_TOKEN_ASYMMETRIC,
}


def quantize(variant: str, source: Path, blocks: torch.Tensor, seed: int, clock: Clock) -> Result:
    model = load(source)
    names = set(linears(model))
    with clock.running():
        quantize_(model, CONFIGS[variant](), filter_fn=lambda _, name: name in names)
    weights = {}
    for name in names:
        weight = model.get_submodule(name).weight
        for _ in range(
            2
        ):  # activation quantization wraps the packed weight once more in some configurations
            weight = getattr(weight, "original_weight_tensor", weight)
        weights[name] = weight.dequantize().float()
    return Result(model, weights, ACTIVATIONS[variant])


if __name__ == "__main__":
    main(["torchao"], list(CONFIGS), quantize)
