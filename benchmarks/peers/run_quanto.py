"""optimum-quanto: INT4 and INT8 weights, and INT8 activations with one calibrated scale per tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from common import Clock, Result, linears, load, main
from optimum.quanto import Calibration, freeze, qint4, qint8
from optimum.quanto import quantize as quanto_quantize

VARIANTS = {
    "quanto:w4a16": (qint4, None),
    "quanto-static:w8a8": (qint8, qint8),
}


def quantize(variant: str, source: Path, blocks: torch.Tensor, seed: int, clock: Clock) -> Result:
    weights, activations = VARIANTS[variant]
    model = load(source)
    names = list(linears(model))
    with clock.running(), torch.no_grad():
        quanto_quantize(model, weights=weights, activations=activations, exclude=["lm_head"])
        if activations:
            with Calibration():
                for block in blocks.split(8):
                    model(block, use_cache=False)
        freeze(model)
    modules = {name: model.get_submodule(name) for name in names}
    found = {n: m.weight.dequantize().detach().float() for n, m in modules.items()}
    rounding = None
    if activations:
        # Its scale is the maximum over 127; outputs are rounded too where the next module allows, which is left out.
        scales = {n: float(m.input_scale) for n, m in modules.items()}
        rounding = {"type": "int", "grain": "tensor", "scales": scales}
    return Result(model, found, rounding)


if __name__ == "__main__":
    main(["optimum-quanto"], list(VARIANTS), quantize)
