"""The loops of quantizing in C++ beside torch's own, in turn, on this machine.

    python benchmarks/quantizing.py

Hessians of 2,048 tokens: float32 products by torch, and rounded ones (ours, or oneDNN's where it has them). Rounding a piece
of a weight to INT4 in groups of 128, with the errors it makes; rounding with learned offsets, forwards and backwards. Causal
attention of a prompt in bf16, and with its gradients. Results go to benchmarks/results/quantizing.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accuracy import processor
from quantkit.kernels.cpu import native
from quantkit.kernels.cpu.prompt_attention import attend

from quantkit import memory
from quantkit.bench.timing import Run, compare
from quantkit.methods import rounding
from quantkit.methods.gptq import accumulate_hessian
from quantkit.methods.learned_rounding import round_with_offset
from quantkit.plain import ELEMENTS

RESULTS = Path(__file__).parent / "results" / "quantizing.json"
TOKENS, SECONDS = 2048, 10.0


def hessian(columns: int) -> dict[str, Run]:
    x, sums = torch.randn(TOKENS, columns), torch.zeros(columns, columns)
    return {
        "torch": lambda _: accumulate_hessian(sums, x),
        "rounded": lambda _: accumulate_hessian(sums, x, rounded=True),
    }


def with_and_without(run: Run) -> dict[str, Run]:
    """A job beside itself without the native library."""

    def by_torch(number: int) -> object:
        with patch.object(native, "library", lambda: None):
            return run(number)

    return {"torch": by_torch, "native": run}


def round_piece() -> dict[str, Run]:
    weight, grid = torch.randn(ELEMENTS // 8192, 8192), rounding.Grid(4)
    scale = rounding.store_bf16(rounding.absmax_scale(weight, 128, grid))

    return with_and_without(lambda _: rounding.quantize_measured(weight, scale, grid))


def round_learned(rows: int, columns: int) -> dict[str, Run]:
    target, grid = torch.randn(rows, columns), rounding.Grid(4)
    scale = rounding.absmax_scale(target, 128, grid).requires_grad_()
    offset, gradient = torch.zeros_like(target).requires_grad_(), torch.randn_like(target)

    def learned(_: int) -> object:
        value = round_with_offset(target, scale, offset, grid)
        return torch.autograd.grad(value, (scale, offset), gradient)

    return with_and_without(learned)


def attention(
    samples: int, tokens: int, heads: int, kv_heads: int, dim: int, *, gradients: bool = False
) -> dict[str, Run]:
    inputs = [
        torch.randn(samples, tokens, n, dim).bfloat16().transpose(1, 2).requires_grad_(gradients)
        for n in (heads, kv_heads, kv_heads)
    ]
    seed = torch.randn(samples, tokens, heads, dim).bfloat16()

    def by_torch(_: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

    def ours(_: int) -> torch.Tensor:
        found = attend(*inputs, dim**-0.5)
        assert found is not None
        return found.transpose(1, 2)

    def back(forward: Callable[[int], torch.Tensor]) -> Run:
        return lambda n: torch.autograd.grad(forward(n), inputs, seed.transpose(1, 2))

    ways = {"torch": by_torch, "native": ours}
    return {name: back(way) for name, way in ways.items()} if gradients else {**ways}


def main() -> None:
    memory.keep_bounded()  # as a run does
    jobs = {f"hessian of {n} inputs": hessian(n) for n in (8192, 2048, 768, 256)}
    jobs[f"rounding {ELEMENTS} numbers"] = round_piece()
    jobs |= {
        f"learned rounding {size}": round_learned(*size) for size in ((768, 256), (8192, 2048))
    }
    # The bundled model's, a 1B's, an 8B's.
    shapes = ((4, 512, 4, 2, 64), (1, 2048, 32, 8, 64), (1, 2048, 32, 8, 128))
    if native.level() == 1:  # with AMX torch's is as fast, and stays
        jobs |= {f"attention {shape}": attention(*shape) for shape in shapes}
        jobs |= {f"with gradients {shape}": attention(*shape, gradients=True) for shape in shapes}
    rows = []
    for name, runs in jobs.items():
        found = compare(runs, torch.device("cpu"), SECONDS)
        (first, before), (second, after) = found.items()
        print(
            f"{name:<36} {first} {1e3 * before.median:8.2f} ms  {second} {1e3 * after.median:8.2f} ms  "
            f"{before.median / after.median:.2f}",
            flush=True,
        )
        rows.append({"what": name} | {way: timing.to_dict() for way, timing in found.items()})
    machine = {"processor": processor(), "torch": torch.__version__,
               "threads": torch.get_num_threads(), "native": native.level()}  # fmt: skip
    RESULTS.write_text(json.dumps({"rows": rows, "machine": machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
