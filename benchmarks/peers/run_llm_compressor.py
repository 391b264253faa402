"""llm-compressor: rounding to nearest, GPTQ, SmoothQuant before it, AWQ; four formats."""

from __future__ import annotations

from pathlib import Path

import torch
from common import FP8_TOKEN, INT8_TOKEN, Clock, Result, linears, load, main, tokenizer
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

FORMATS = {
    "w4a16": ("W4A16", None),
    "w8a8": ("W8A8", INT8_TOKEN),
    "w4a8-int": ("W4A8", INT8_TOKEN),
    "w4a8-fp8": ("W4AFP8", FP8_TOKEN),
}
METHODS = ("rtn", "gptq", "sq-gptq", "awq")


def modifiers(method: str, scheme: str) -> list:
    target = {"targets": "Linear", "ignore": ["lm_head"]}
    last = GPTQModifier if method.endswith("gptq") else QuantizationModifier
    before = {"sq-gptq": [SmoothQuantModifier(smoothing_strength=0.8)], "awq": [AWQModifier()]}
    return [*before.get(method, []), last(scheme=scheme, **target)]


def quantize(variant: str, source: Path, blocks: torch.Tensor, seed: int, clock: Clock) -> Result:
    method, _, form = variant.rpartition(":")
    scheme, activations = FORMATS[form]
    model = load(source)
    data = Dataset.from_dict(
        {"input_ids": blocks.tolist(), "attention_mask": torch.ones_like(blocks).tolist()}
    )
    with clock.running():
        oneshot(
            model=model,
            tokenizer=tokenizer(source),
            dataset=None if method == "rtn" else data,
            recipe=modifiers(method, scheme),
            max_seq_length=blocks.shape[1],
            num_calibration_samples=len(blocks),
            shuffle_calibration_samples=False,
        )
    return Result(model, {n: weight(m) for n, m in linears(model).items()}, activations)


def weight(module: torch.nn.Linear) -> torch.Tensor:
    """The weight that is served: its codes times the stored scale. Rounding a rounded one changes nothing."""
    args = module.quantization_scheme.weights
    zero = getattr(module, "weight_zero_point", None)
    group = getattr(module, "weight_g_idx", None)
    value, scale = module.weight.detach().float(), module.weight_scale.detach().float()
    extra = {} if group is None else {"g_idx": group}
    return fake_quantize(value, scale, zero, args, **extra)


if __name__ == "__main__":
    variants = [f"{m}:{f}" for f in FORMATS for m in METHODS]
    main(["llmcompressor", "compressed-tensors"], variants, quantize)
