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


@torch.no_grad()
def perplexity(
    model: Any,
    tokens: torch.Tensor,
    seqlen: int,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a model on tokens, int64 [n].

    Args:
        seqlen: tokens in a window.
        limit: use at most so many windows.
        progress: called with (windows done, windows).

    Raises:
        QuantkitError: the text is shorter than one window, or the model's outputs are not finite.
    """
    windows = tokens.numel() // seqlen
    if windows == 0:
        raise QuantkitError(
            f"text of {tokens.numel()} tokens: shorter than one window of {seqlen}; use --seqlen"
        )
    windows = min(windows, limit or windows)
    blocks = tokens[: windows * seqlen].view(windows, seqlen)
    batch = max(1, _TOKENS_PER_BATCH // seqlen)
    losses: list[torch.Tensor] = []
    for first in range(0, windows, batch):
        ids = blocks[first : first + batch].to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        losses.append(loss.mean(1).double().cpu())
        if progress:
            progress(min(first + batch, windows), windows)
    each = torch.cat(losses)
    mean = float(each.mean())
    if not math.isfinite(mean):
        raise QuantkitError(
            "the model's outputs on this text are not finite; the checkpoint is damaged"
        )
    ppl = math.exp(mean)
    error = ppl * float(each.std()) / math.sqrt(windows) if windows > 1 else None
    return Perplexity(ppl, windows * seqlen, windows, seqlen, error)
