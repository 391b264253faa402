"""How far a model's predictions are from those of its original: token by token, on the same text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantkit.evaluate.perplexity import Tell, batch_size, mean_loss, standard_error

# Logits that are turned into float64 probabilities at once: 128 MiB.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Divergence:
    """A model beside its original. Standard errors are over the windows, None with one window.

    Attributes:
        ratio: of the perplexities, model over original. Its error is that of the windows' *paired* losses,
            far smaller than that of either perplexity.
        kl: KL(original || model), in nats: mean over tokens.
        top1: share of tokens for which both find the same token the likeliest.
        tokens: how many predictions were compared: all but the first of each window.
    """

    ratio: float
    ratio_stderr: float | None
    kl: float | None = None
    kl_stderr: float | None = None
    top1: float | None = None
    top1_stderr: float | None = None
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Windows:
    """Figures of each window, float64 [windows]."""

    losses: torch.Tensor
    original_losses: torch.Tensor
    kl: torch.Tensor
    top1: torch.Tensor


@torch.no_grad()
def compare_windows(
    model: Any, original: Any, blocks: torch.Tensor, progress: Tell | None = None
) -> Windows:
    """Run both models over the windows, int64 [windows, seqlen]; only a batch's logits are in memory."""
    batch = min(batch_size(model, blocks.shape[1]), batch_size(original, blocks.shape[1]))
    rows = []
    for first in range(0, len(blocks), batch):
        ids = blocks[first : first + batch]
        mine = model(ids.to(model.device), use_cache=False).logits[:, :-1]
        theirs = original(ids.to(original.device), use_cache=False).logits[:, :-1]
        for window, q, p in zip(ids, mine, theirs):
            kl, same = kl_and_top1(p, q.to(p.device))
            rows.append(
                (mean_loss(q, window.to(q.device)), mean_loss(p, window.to(p.device)), kl, same)
            )
        if progress:
            progress(min(first + batch, len(blocks)), len(blocks))
    return Windows(*torch.tensor(rows, dtype=torch.float64).T.contiguous())


def kl_and_top1(original: torch.Tensor, model: torch.Tensor) -> tuple[float, float]:
    """Mean over tokens of KL(original || model) in nats, and the share of tokens with the same argmax.

    Args:
        original, model: logits [tokens, vocabulary]. Where one is padded beyond the other, the padding is left out.
    """
    tokens, vocabulary = len(original), min(original.shape[1], model.shape[1])
    step = max(1, _CHUNK // vocabulary)
    kl = same = 0.0
    for first in range(0, tokens, step):
        p = original[first : first + step, :vocabulary]
        q = model[first : first + step, :vocabulary]
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        # In float32 the rounding of the two normalizers would be as large as an 8-bit model's divergence.
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
    return kl / tokens, same / tokens


def divergence_of(losses: torch.Tensor, original: torch.Tensor) -> Divergence:
    """The ratio alone, from both models' window losses, float64 [windows]."""
    difference = losses - original
    ratio = math.exp(float(difference.mean()))
    error = standard_error(difference)
    return Divergence(ratio, error and ratio * error)


def full_divergence_of(windows: Windows, seqlen: int) -> Divergence:
    ratio = divergence_of(windows.losses, windows.original_losses)
    return Divergence(
        ratio.ratio,
        ratio.ratio_stderr,
        float(windows.kl.mean()),
        standard_error(windows.kl),
        float(windows.top1.mean()),
        standard_error(windows.top1),
        len(windows.kl) * (seqlen - 1),
    )
