"""Times that can be compared: candidates take turns, read cold data, and are judged by medians.

A machine's speed drifts while one measures; so every round times every candidate once, each round begins
with another one, and what is compared are the medians over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

Run = Callable[[int], object]

_LEAST_ROUNDS = 7
_LEAST_SAMPLE = 1e-3  # seconds: far above the clock's resolution
_MOST_COPIES = 64
_CACHE_GUESS = 64 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over the rounds and its quartiles."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def compare(runs: Mapping[str, Run], device: torch.device, seconds: float) -> dict[str, Timing]:
    """Time every run in turn for about `seconds` in all.

    Args:
        runs: name -> a call that takes a counter, by which it picks one of its copies of the data.
        device: where they run; on a GPU the calls of a sample are recorded as one CUDA graph, so that no
            time of the host's is counted.
    """
    sampler = _on_gpu if device.type == "cuda" else _on_cpu
    samplers = {name: sampler(run) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = time.perf_counter() + seconds
    turn = 0
    while turn < _LEAST_ROUNDS or time.perf_counter() < end:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(samplers[name]())
        turn += 1
    return {name: Timing.of(found) for name, found in samples.items()}


def _on_cpu(run: Run) -> Callable[[], float]:
    run(0)  # compiles, allocates
    start = time.perf_counter()
    run(1)
    calls = max(1, int(_LEAST_SAMPLE / max(time.perf_counter() - start, 1e-7)))
    number = 0

    def sample() -> float:
        nonlocal number
        start = time.perf_counter()
        for i in range(number, number + calls):
            run(i)
        number += calls
        return (time.perf_counter() - start) / calls

    return sample


def _on_gpu(run: Run) -> Callable[[], float]:
    """All the copies once, as a graph: launched from the host, a small kernel would wait for Python."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):  # compiles, allocates
            run(i)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(_MOST_COPIES):
                run(i)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / _MOST_COPIES

    return sample


def copies(size: int, device: torch.device) -> int:
    """How many copies of data of `size` bytes outlast the last cache twice over, 1 to 64."""
    return max(1, min(_MOST_COPIES, -(-2 * cache_bytes(device) // max(1, size))))


@lru_cache(maxsize=4)
def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_CACHE_GUESS] * (not Path("/sys/devices/system/cpu/cpu0/cache").is_dir())
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes, default=_CACHE_GUESS)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches: bytes per second read or copied, operations per second of a product.

    Attributes:
        bandwidth: the better of reading alone and copying.
        products: type of the operands -> operations (a multiply and an add are two) per second.
    """

    bandwidth: float
    products: Mapping[str, float]

    def floor(self, size: float, operations: float, operands: str) -> float:
        """The least seconds for so many bytes and operations."""
        rate = self.products.get(operands) or self.products["bf16"]
        return max(size / self.bandwidth, operations / rate)


@lru_cache(maxsize=4)
def ceilings(device: torch.device, seconds: float = 1.0) -> Ceilings:
    """Measured with torch's own copy, sum and products."""
    return Ceilings(_bandwidth(device, seconds), _products(device, seconds))


def _bandwidth(device: torch.device, seconds: float) -> float:
    words = (1 << 30 if device.type == "cuda" else 1 << 27) // 4
    source = torch.ones(words, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {
        "copy": lambda i: target.copy_(source),
        "read": lambda i: source.sum(),
    }
    found = compare(runs, device, seconds)
    return max(8 * words / found["copy"].median, 4 * words / found["read"].median)


def _products(device: torch.device, seconds: float) -> dict[str, float]:
    gpu = device.type == "cuda"
    size = 8192 if gpu else 2048
    a = torch.randn(size, size, device=device)
    wide, codes = a.bfloat16(), a.to(torch.int8)
    runs: dict[str, Run] = {
        "bf16": lambda i: wide @ wide,
        "int8": lambda i: torch._int_mm(codes, codes.t()),
    }
    if gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        small, one = a.to(torch.float8_e4m3fn), torch.ones((), device=device)
        runs["fp8"] = lambda i: torch._scaled_mm(
            small, small.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    found = compare(runs, device, seconds)
    return {name: 2 * size**3 / timing.median for name, timing in found.items()}
