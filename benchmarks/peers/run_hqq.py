"""HQQ: half-quadratic rounding with zero points, no data; groups of 128 and of its own 64."""

from __future__ import annotations

from pathlib import Path

import torch
from common import Clock, Result, linears, load, main
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

GROUPS = {"hqq-g128:w4a16": 128, "hqq-g64:w4a16": 64}


def quantize(variant: str, source: Path, blocks: torch.Tensor, seed: int, clock: Clock) -> Result:
    model = load(source)
    config = BaseQuantizeConfig(nbits=4, group_size=GROUPS[variant], axis=1)
    weights = {}
    with clock.running():
        for name, linear in linears(model).items():
            packed = HQQLinear(
                linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False
            )
            weights[name] = packed.dequantize().float()
            linear.weight.data.copy_(weights[name])
    return Result(model, weights)


if __name__ == "__main__":
    main(["hqq"], list(GROUPS), quantize)
