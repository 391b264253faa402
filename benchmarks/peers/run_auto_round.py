"""AutoRound: 200 signed-gradient steps per block, and its own rounding to nearest beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from auto_round import AutoRound
from common import Clock, Result, linears, load, main, tokenizer

ITERATIONS = {"autoround-200": 200, "rtn": 0}


def quantize(variant: str, source: Path, blocks: torch.Tensor, seed: int, clock: Clock) -> Result:
    method, _, _ = variant.rpartition(":")
    model = load(source)
    with clock.running():
        rounder = AutoRound(
            model,
            tokenizer(source),
            scheme="W4A16",
            iters=ITERATIONS[method],
            dataset=[{"input_ids": block[None], "attention_mask": torch.ones_like(block[None])} for block in blocks],
            nsamples=len(blocks),
            seqlen=blocks.shape[1],
            batch_size=8,
            seed=seed,
            device_map="cpu",
            enable_torch_compile=False,
        )  # fmt: skip
        made = rounder.quantize()
    model = made[0] if isinstance(made, tuple) else made
    return Result(model, {n: m.weight.detach().float() for n, m in linears(model).items()})


if __name__ == "__main__":
    main(["auto-round"], [f"{m}:w4a16" for m in ITERATIONS], quantize)
