"""Perplexity by the protocol that GPTQ's paper and its followers report, named in every result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantkit.errors import QuantkitError

PROTOCOL = "gptq"
DEFAULT_SEQLEN = 2048
_TOKENS_PER_BATCH = 4096
# Logits of a batch: 2^28 of them are 0.5 GB in bf16. At least one window is taken whatever it needs.
_LOGITS_PER_BATCH = 1 << 28

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """A result.

    Attributes:
        ppl: exp of the mean token loss over all windows.
        tokens: in the windows; windows of `seqlen` tokens.
        stderr: standard error of ppl, from the spread of the windows' losses; None with one window.
        protocol: `gptq`: the whole text tokenized once, consecutive windows, the last partial one dropped.
    """

    ppl: float
    tokens: int
    windows: int
    seqlen: int
    stderr: float | None
    protocol: str = PROTOCOL

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    model: Any,
    tokens: torch.Tensor,
    seqlen: int,
    *,
    limit: int | None = None,
    progress: Tell | None = None,
) -> Perplexity:
    """Perplexity of a model on tokens, int64 [n].

    Args:
        seqlen: tokens in a window.
        limit: use at most so many windows.
        progress: called with (windows done, windows).

    Raises:
        QuantkitError: the text is shorter than one window, or the model's outputs are not finite.
    """
    blocks = cut_windows(tokens, seqlen, limit)
    return perplexity_of(window_losses(model, blocks, progress), seqlen)


def cut_windows(tokens: torch.Tensor, seqlen: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive windows, int64 [windows, seqlen], of tokens [n]; the last partial one is dropped.

    Raises:
        QuantkitError: there is not one whole window.
    """
    windows = tokens.numel() // seqlen
    if windows == 0:
        raise QuantkitError(
            f"text of {tokens.numel()} tokens: shorter than one window of {seqlen}; use --seqlen"
        )
    windows = min(windows, limit or windows)
    return tokens[: windows * seqlen].view(windows, seqlen)


def batch_size(model: Any, seqlen: int) -> int:
    """Windows that go through the model at once: the logits of a batch are what fills the memory."""
    tokens = min(_TOKENS_PER_BATCH, _LOGITS_PER_BATCH // int(model.config.vocab_size))
    return max(1, tokens // seqlen)


@torch.no_grad()
def window_losses(model: Any, blocks: torch.Tensor, progress: Tell | None = None) -> torch.Tensor:
    """Mean token loss of each window, float64 [windows], of int64 [windows, seqlen]."""
    losses = []
    batch = batch_size(model, blocks.shape[1])
    for first in range(0, len(blocks), batch):
        ids = blocks[first : first + batch].to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1]
        losses += [mean_loss(row, window) for row, window in zip(logits, ids)]
        if progress:
            progress(min(first + batch, len(blocks)), len(blocks))
    return torch.tensor(losses, dtype=torch.float64)


def mean_loss(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Mean loss of a window's tokens [seqlen] but the first, given logits [seqlen - 1, vocabulary]."""
    loss = torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none")
    return float(loss.double().mean())


def perplexity_of(losses: torch.Tensor, seqlen: int) -> Perplexity:
    """The result from the windows' mean losses, float64 [windows].

    Raises:
        QuantkitError: they are not finite.
    """
    windows, mean = len(losses), float(losses.mean())
    if not math.isfinite(mean):
        raise QuantkitError(
            "the model's outputs on this text are not finite; the checkpoint is damaged"
        )
    ppl = math.exp(mean)
    error = standard_error(losses)
    return Perplexity(ppl, windows * seqlen, windows, seqlen, error and ppl * error)


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of values [windows], from their spread; None where there is one."""
    count = len(values)
    return float(values.std()) / math.sqrt(count) if count > 1 else None
