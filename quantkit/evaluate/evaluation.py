"""Several models on several texts, each beside its original: what `quantkit eval` runs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.data import read_text, tokenize
from quantkit.errors import QuantkitError
from quantkit.evaluate.divergence import (
    Divergence,
    compare_windows,
    divergence_of,
    full_divergence_of,
)
from quantkit.evaluate.perplexity import (
    DEFAULT_SEQLEN,
    Perplexity,
    cut_windows,
    perplexity_of,
    window_losses,
)
from quantkit.evaluate.tasks import find_tasks, run_tasks
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.names import find_model

# Perplexity is always measured; the others need the original in memory beside the model.
METRICS = ("ppl", "kl", "top1")
Progress = Callable[[int, int, str], None]


@dataclass
class Evaluation:
    """What was measured of one model.

    Attributes:
        bytes: of its tensors; `original_bytes` of its original's.
        ppl, original_ppl: text -> Perplexity.
        divergence: text -> how far it is from its original; empty if it has none.
        tasks, original_tasks: lm-eval's task -> metric -> value.
        seconds: this model's share of the run.
    """

    model: str
    bytes: int
    original: str | None = None
    original_bytes: int | None = None
    ppl: dict[str, Perplexity] = field(default_factory=dict)
    original_ppl: dict[str, Perplexity] = field(default_factory=dict)
    divergence: dict[str, Divergence] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    original_tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `baseline` has the shape of `ppl`, or is null."""
        data: dict[str, Any] = {
            "model": self.model,
            "ppl": {text: result.to_dict() for text, result in self.ppl.items()},
            "baseline": {text: r.to_dict() for text, r in self.original_ppl.items()} or None,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 2),
            "baseline_model": self.original,
            "baseline_bytes": self.original_bytes,
            "divergence": {text: r.to_dict() for text, r in self.divergence.items()} or None,
        }
        if self.tasks:
            scores = {self.model: self.tasks}
            data["tasks"] = scores | ({self.original: self.original_tasks} if self.original else {})
        return data


@dataclass
class _Loaded:
    """An original that stays in memory while its models are measured, and what is known of it already."""

    name: str
    model: Any
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate(
    models: dict[str, str | None],
    texts: list[str],
    *,
    metrics: tuple[str, ...] = METRICS,
    tasks: list[str] | None = None,
    seqlen: int | None = None,
    limit: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Measure models, each with its original beside it where it has one.

    At most two models are in memory at a time, and the logits of one batch of windows.

    Args:
        models: model -> its original, or None.
        texts: `sample`, `wikitext` or UTF-8 files.
        metrics: of `METRICS`; without `kl` and `top1` one model is in memory at a time.
        tasks: lm-eval's names, or task files.
        seqlen: tokens in a window; 2048 or the least of the models' maxima if left out.
        limit: at most so many windows, and examples of a task.
        progress: called with (done, total, what).

    Raises:
        QuantkitError: an unknown metric or task, a text too short, tokenizers that differ, a model that
            cannot be read; before anything is loaded where that can be known.
    """
    check_metrics(metrics)
    tasks = tasks or []
    if tasks:
        find_tasks(tasks)
    everyone = list(dict.fromkeys([*models, *(o for o in models.values() if o)]))
    checkpoints = {name: Checkpoint(find_model(name)) for name in everyone}
    length = _window_length(checkpoints, seqlen)
    blocks = _blocks(models, texts, length, limit) if texts else {}
    run = _Run(metrics, tasks, limit, device, length, blocks, progress or (lambda *_: None))

    results: dict[str, Evaluation] = {}
    for original in dict.fromkeys(models.values()):
        loaded = None
        for model in [m for m, o in models.items() if o == original]:
            started = time.monotonic()
            found = Evaluation(model, checkpoints[model].bytes)
            if original is not None:
                loaded = loaded or run.original(original)
                found.original, found.original_bytes = original, checkpoints[original].bytes
            run.measure(found, loaded)
            found.seconds = time.monotonic() - started
            results[model] = found
            gc.collect()
    return [results[model] for model in models]


def check_metrics(metrics: tuple[str, ...]) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise QuantkitError(f"{metric}: unknown metric; {', '.join(METRICS)} are known")


def _window_length(checkpoints: dict[str, Checkpoint], seqlen: int | None) -> int:
    """One window for all models, so that they are measured on the same tokens."""
    longest = {}
    for name, checkpoint in checkpoints.items():
        value = checkpoint.config.get("max_position_embeddings")
        longest[name] = value if isinstance(value, int) and value > 1 else DEFAULT_SEQLEN
        if seqlen is not None and seqlen > longest[name]:
            raise QuantkitError(
                f"--seqlen {seqlen}: {name} was made for at most {longest[name]} tokens"
            )
    return seqlen or min(DEFAULT_SEQLEN, *longest.values())


def _blocks(
    models: dict[str, str | None], texts: list[str], seqlen: int, limit: int | None
) -> dict[str, dict[str, torch.Tensor]]:
    """Model -> text -> windows of tokens, the same for a model and its original."""
    from quantkit.models.tokenizer import load_tokenizer

    contents = {text: read_text(text, split="test") for text in texts}
    tokens: dict[Path, dict[str, torch.Tensor]] = {}

    def tokens_of(name: str) -> dict[str, torch.Tensor]:
        path = find_model(name)
        if path not in tokens:
            tokenizer = load_tokenizer(path)
            tokens[path] = {text: tokenize(tokenizer, c) for text, c in contents.items()}
        return tokens[path]

    blocks: dict[str, dict[str, torch.Tensor]] = {}
    for model, original in models.items():
        mine = tokens_of(model)
        for text, ids in mine.items():
            if original is not None and not torch.equal(ids, tokens_of(original)[text]):
                raise QuantkitError(
                    f"{model} and {original} have different tokenizers, so their figures cannot be compared; "
                    "name another --baseline, or `none`"
                )
        try:
            blocks[model] = {text: cut_windows(ids, seqlen, limit) for text, ids in mine.items()}
        except QuantkitError as error:
            short = next(text for text, ids in mine.items() if ids.numel() < seqlen)
            raise QuantkitError(f"{short}: {error}") from None
    return blocks


@dataclass
class _Run:
    """What is the same for all models of a run."""

    metrics: tuple[str, ...]
    tasks: list[str]
    limit: int | None
    device: str
    seqlen: int
    blocks: dict[str, dict[str, torch.Tensor]]
    progress: Progress

    @property
    def together(self) -> bool:
        """Whether a model and its original have to be in memory at the same time."""
        return bool({"kl", "top1"} & set(self.metrics))

    def load(self, name: str) -> Any:
        from quantkit.runtime.load import load

        return load(name, device=self.device)

    def original(self, name: str) -> _Loaded:
        """The original, measured at once if it need not stay."""
        loaded = _Loaded(name, self.load(name))
        if self.tasks:
            loaded.tasks = self.score(name, loaded.model)
        return loaded

    def score(self, name: str, model: Any) -> dict[str, dict[str, float]]:
        from quantkit.models.tokenizer import load_tokenizer

        return run_tasks(model, load_tokenizer(find_model(name)), self.tasks, limit=self.limit)

    def measure(self, found: Evaluation, original: _Loaded | None) -> None:
        if original and not self.together:
            self.without_model(original, found.model)
        model = self.load(found.model)
        for text, blocks in self.blocks.get(found.model, {}).items():
            tell = self.teller(f"{Path(found.model).name}, {Path(text).name}")
            if original is None:
                losses = window_losses(model, blocks, tell)
            elif self.together:
                windows = compare_windows(model, original.model, blocks, tell)
                losses, original.losses[text] = windows.losses, windows.original_losses
                found.divergence[text] = full_divergence_of(windows, self.seqlen)
            else:
                losses = window_losses(model, blocks, tell)
                found.divergence[text] = divergence_of(losses, original.losses[text])
            found.ppl[text] = perplexity_of(losses, self.seqlen)
            if original:
                found.original_ppl[text] = perplexity_of(original.losses[text], self.seqlen)
        if self.tasks:
            found.tasks = self.score(found.model, model)
            found.original_tasks = original.tasks if original else {}

    def without_model(self, original: _Loaded, model: str) -> None:
        """Measure an original alone, and let go of it."""
        if original.model is None:
            return
        for text, blocks in self.blocks.get(model, {}).items():
            tell = self.teller(f"{Path(original.name).name}, {Path(text).name}")
            original.losses[text] = window_losses(original.model, blocks, tell)
        original.model = None
        gc.collect()

    def teller(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(done, total, what)
