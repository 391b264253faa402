"""A whole model beside its original: load, memory, prompts and decoding, through one loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from quantkit.bench.ops import BASELINE, OURS, machine
from quantkit.bench.timing import Timing
from quantkit.errors import QuantkitError

_LEAST_ROUNDS = 5
Progress = Callable[[int, int, str], None]


@dataclass
class Loaded:
    """What loading took.

    Attributes:
        seconds: from the call to a model that is ready.
        packed_bytes: of the checkpoint's tensors.
        tensor_bytes: of the parameters and buffers of the model.
        process_bytes: that the process (on a GPU: torch's allocator) holds more than before.
        peak_bytes: the most on a GPU while loading, or None.
    """

    seconds: float
    packed_bytes: int
    tensor_bytes: int
    process_bytes: int
    peak_bytes: int | None = None


@dataclass
class Report:
    """Plain data; `seconds` are per prompt and per step, `tokens_per_second` of the whole batch."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    loaded: dict[str, Loaded] = field(default_factory=dict)
    prefill: dict[str, Timing] = field(default_factory=dict)
    decode: dict[str, Timing] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        batch, prompt = self.settings["batch"], self.settings["prompt"]
        return {
            "machine": self.machine,
            "settings": self.settings,
            "loaded": {name: asdict(found) for name, found in self.loaded.items()},
            "prefill": _speeds(self.prefill, batch * prompt),
            "decode": _speeds(self.decode, batch),
        }


def _speeds(timings: dict[str, Timing], tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {"seconds": t.to_dict(), "tokens_per_second": tokens / t.median}
        for name, t in timings.items()
    }
    if BASELINE in timings:
        found["ratio"] = timings[BASELINE].median / timings[OURS].median
    return found


def bench_model(
    load_ours: Callable[[], Any],
    load_baseline: Callable[[], Any] | None,
    packed_bytes: dict[str, int],
    device: torch.device,
    *,
    batch: int = 1,
    prompt: int = 128,
    new_tokens: int = 32,
    seconds: float = 10.0,
    progress: Progress | None = None,
) -> Report:
    """Load both, then prompts and steps in turn: a prompt and its steps of one, then of the other.

    Args:
        load_ours, load_baseline: give a model on `device`; no baseline: None.
        packed_bytes: of `quantkit` and `bf16`, for the report.
        batch, prompt, new_tokens: sequences, tokens of each prompt, steps after it.
        seconds: spent on measuring, in all.

    Raises:
        QuantkitError: the sequences are longer than the model was made for.
    """
    from quantkit.runtime.decoding import Decoder

    settings = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens}
    report = Report(machine(device), settings)
    tell = progress or (lambda done, total, what: None)
    models: dict[str, Any] = {}
    loaders = {OURS: load_ours} | ({BASELINE: load_baseline} if load_baseline else {})
    for number, (name, load) in enumerate(loaders.items()):
        tell(number, len(loaders), f"loading {name}")
        models[name], report.loaded[name] = _load(load, packed_bytes[name], device)
    length = prompt + new_tokens + 1
    config = models[OURS].config.get_text_config(decoder=True)
    longest = int(getattr(config, "max_position_embeddings", length))
    if length > longest:
        raise QuantkitError(
            f"{prompt} + {new_tokens} tokens: the model was made for at most {longest}; "
            "lower --prompt or --new-tokens"
        )
    decoders = {name: Decoder(model, batch, length) for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (batch, prompt), generator=generator).to(device)
    samples: dict[str, tuple[list[float], list[float]]] = {n: ([], []) for n in decoders}
    for decoder in decoders.values():
        _round(decoder, ids, min(4, new_tokens), device)  # compiles, allocates, records
    names, turn, started = list(decoders), 0, time.perf_counter()
    while turn < _LEAST_ROUNDS or time.perf_counter() - started < seconds:
        tell(turn, max(_LEAST_ROUNDS, turn + 1), "measuring")
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            first, step = _round(decoders[name], ids, new_tokens, device)
            samples[name][0].append(first)
            samples[name][1].append(step)
        turn += 1
    for name, (first_times, step_times) in samples.items():
        report.prefill[name] = Timing.of(first_times)
        report.decode[name] = Timing.of(step_times)
    return report


def _round(
    decoder: Any, ids: torch.Tensor, steps: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of the prompt, and of one step after it."""
    _wait(device)
    start = time.perf_counter()
    decoder.prefill(ids)
    _wait(device)
    between = time.perf_counter()
    for _ in range(steps):
        decoder.step()
    _wait(device)
    return between - start, (time.perf_counter() - between) / steps


def _load(load: Callable[[], Any], packed: int, device: torch.device) -> tuple[Any, Loaded]:
    gc.collect()
    before = _held(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    model = load()
    _wait(device)
    seconds = time.perf_counter() - start
    gc.collect()
    tensors = {
        t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())
    }
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    found = Loaded(seconds, packed, sum(tensors.values()), _held(device) - before, peak)
    return model, found


def _held(device: torch.device) -> int:
    """Bytes of memory in use: resident, without the pages of files that are mapped."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line[:8] == "RssAnon:")
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
