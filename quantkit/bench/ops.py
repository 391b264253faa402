"""Every op beside what torch does in bf16, on the sizes of a Llama-3-8B or on given ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from quantkit.bench import attention, peers
from quantkit.bench.case import Case
from quantkit.bench.synthetic import random_linear
from quantkit.bench.timing import ceilings, compare, copies
from quantkit.formats.scheme import ActivationFormat, Scheme, WeightFormat
from quantkit.kernels.hadamard import hadamard
from quantkit.kernels.hadamard_quantize import hadamard_quantize
from quantkit.kernels.quantize_fp8 import quantize_fp8
from quantkit.kernels.quantize_int8 import quantize_int8
from quantkit.kernels.rmsnorm_quantize import rmsnorm_quantize
from quantkit.kernels.silu_mul_quantize import silu_mul_quantize

# Llama-3-8B's: o, q with k and v, gate with up, down; inputs x outputs.
SHAPES = ((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096))
ROWS = (1, 4, 16, 64, 256, 1024)
_INT4 = WeightFormat(4, 128)
LINEARS = {
    "int4_linear": Scheme(_INT4),
    "int4_fp8_linear": Scheme(WeightFormat(4, 128, "fp8_channel"), ActivationFormat(8, "float")),
    "int4_int8_linear": Scheme(_INT4, ActivationFormat(8)),
    "hadamard_int4_linear": Scheme(
        WeightFormat(4, 128, half=True), ActivationFormat(8, half=True), 128
    ),
    "int8_linear": Scheme(WeightFormat(8, None), ActivationFormat(8)),
}
BASELINE = "bf16"
OURS = "quantkit"
Progress = Callable[[int, int, str], None]


@dataclass
class Report:
    """What a run found: plain data for JSON, the table and the picture.

    Attributes:
        machine: device, versions, threads, ceilings.
        results: one dictionary per case: op, size, rows, seconds per way, ratio, roofline share.
        skipped: what could not be timed, and why.
    """

    machine: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "results": self.results, "skipped": self.skipped}


def names() -> list[str]:
    """Every op that can be timed."""
    return [*LINEARS, *_ROW_OPS, *attention.OPS]


def bench_ops(
    cases: list[tuple[str, Callable[[], Case]]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    progress: Progress | None = None,
) -> Report:
    """Time the cases, each beside bf16 and whatever peers are installed.

    Args:
        cases: from `make_cases`.
        seconds: spent on one case.
        progress: called with (cases done, cases, what comes).
    """
    ceiling = ceilings(device, min(1.0, seconds))
    report = Report(machine(device) | {
        "bytes_per_second": ceiling.bandwidth,
        "operations_per_second": dict(ceiling.products),
    })  # fmt: skip
    for number, (what, make) in enumerate(cases):
        if progress:
            progress(number, len(cases), what)
        case = make()
        report.skipped += [f"{what}: {reason}" for reason in case.skipped]
        timings = compare(case.runs, device, seconds)
        ours = timings[OURS].median
        report.results.append(
            {
                "op": case.op,
                "size": case.size,
                "rows": case.rows,
                "seconds": {name: timing.to_dict() for name, timing in timings.items()},
                "ratio": {n: t.median / ours for n, t in timings.items() if n != OURS},
                "bytes": case.bytes,
                "operations": case.operations,
                "roofline": ceiling.floor(case.bytes, case.operations, case.operands) / ours,
            }
        )
    return report


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    import platform

    from quantkit import __version__

    found: dict[str, Any] = {
        "device": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "quantkit": __version__,
        "python": platform.python_version(),
    }
    if device.type == "cpu":
        found |= {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        }
    else:
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def make_cases(
    ops: list[str],
    device: torch.device,
    *,
    rows: tuple[int, ...] = ROWS,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    contexts: tuple[int, ...] = attention.CONTEXTS,
    batch: int = 1,
) -> list[tuple[str, Callable[[], Case]]]:
    """(what it is, a function that allocates it) for every op at every size.

    Args:
        ops: of `names()`.
        rows: tokens of a linear or row op.
        shapes: (inputs, outputs) of the linear ops; the inputs are the row ops' sizes.
        contexts: tokens in the cache of attention.
        batch: sequences of attention.
    """
    return list(_cases(ops, device, rows, shapes, contexts, batch))


def _cases(
    ops: list[str],
    device: torch.device,
    rows: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    contexts: tuple[int, ...],
    batch: int,
) -> Iterator[tuple[str, Callable[[], Case]]]:
    for op in ops:
        if op in LINEARS:
            for k, n in shapes:
                for m in rows:
                    yield f"{op} {k}x{n} M={m}", partial(_linear, op, m, k, n, device)
        elif op in _ROW_OPS:
            for k in sorted({k for k, _ in shapes}):
                for m in rows:
                    yield f"{op} {k} M={m}", partial(_row_op, op, m, k, device)
        else:
            for make in attention.OPS[op]:
                for context in contexts:
                    yield f"{op} {batch}x{context}", partial(make, op, batch, context, device)


def _linear(op: str, m: int, k: int, n: int, device: torch.device) -> Case:
    """Quantization of the activations counted in, as a model runs it."""
    scheme = LINEARS[op]
    packed, dense = scheme.packed_bytes(n, k), 2 * n * k
    ours = [
        random_linear(k, n, scheme, device, seed).eval() for seed in range(copies(packed, device))
    ]
    theirs = [
        torch.randn(n, k, dtype=torch.bfloat16, device=device) for _ in range(copies(dense, device))
    ]
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    runs: dict[str, Callable[[int], object]] = {
        OURS: torch.inference_mode()(lambda i: ours[i % len(ours)](x)),
        BASELINE: torch.inference_mode()(lambda i: F.linear(x, theirs[i % len(theirs)])),
    }
    others, skipped = peers.linear(op, x, theirs)
    return Case(
        op,
        f"{k}x{n}",
        m,
        runs | others,
        packed + 2 * m * (k + n),
        2.0 * m * k * n,
        _operands(scheme, device),
        skipped,
    )


def _operands(scheme: Scheme, device: torch.device) -> str:
    acts = scheme.activations
    if acts is None:
        return "bf16"
    # CPUs have no FP8 products: theirs are bf16.
    return "int8" if acts.type == "int" else "fp8" if device.type == "cuda" else "bf16"


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _blocks(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return (x.view(-1, len(matrix)) @ matrix).view(x.shape)


# Op -> (ours, the same in torch's bf16 with its own quantizer, inputs per output, bytes an element).
_RowOp = tuple[
    Callable[[torch.Tensor, Any], object], Callable[[torch.Tensor, Any], object], int, int
]
_ROW_OPS: Mapping[str, _RowOp] = {
    "quantize_fp8": (
        lambda x, w: quantize_fp8(x), lambda x, w: quantize_fp8.reference(x), 1, 3,
    ),
    "quantize_int8": (
        lambda x, w: quantize_int8(x), lambda x, w: quantize_int8.reference(x), 1, 3,
    ),
    "rmsnorm_quantize": (
        lambda x, w: rmsnorm_quantize(x, w[0], 1e-5, "fp8"),
        lambda x, w: quantize_fp8.reference(_norm(x, w[0])), 1, 5,
    ),
    "silu_mul_quantize": (
        lambda x, w: silu_mul_quantize(x, "fp8"),
        lambda x, w: quantize_fp8.reference(_gate(x)), 2, 5,
    ),
    "hadamard": (
        lambda x, w: hadamard(x, 128), lambda x, w: _blocks(x, w[1]), 1, 4,
    ),
    "hadamard_quantize": (
        lambda x, w: hadamard_quantize(x, "int8", 8, 128),
        lambda x, w: quantize_int8.reference(_blocks(x, w[1])), 1, 3,
    ),
}  # fmt: skip


def _row_op(op: str, m: int, k: int, device: torch.device) -> Case:
    """Beside the same steps in plain torch, one after the other."""
    ours, theirs, inputs, size = _ROW_OPS[op]
    count = copies(m * k * size, device)
    x = [torch.randn(m, inputs * k, dtype=torch.bfloat16, device=device) for _ in range(count)]
    weights = (
        torch.rand(k, dtype=torch.bfloat16, device=device),
        torch.randn(128, 128, dtype=torch.bfloat16, device=device) * 128**-0.5,
    )
    runs: dict[str, Callable[[int], object]] = {
        OURS: torch.inference_mode()(lambda i: ours(x[i % count], weights)),
        BASELINE: torch.inference_mode()(lambda i: theirs(x[i % count], weights)),
    }
    others, skipped = peers.rows(op, x)
    return Case(op, str(k), m, runs | others, m * k * size, 0.0, "bf16", skipped)
