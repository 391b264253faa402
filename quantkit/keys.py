"""FireQ's factors on the keys of a decoder layer: which are taken, and where they go."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import nn

from quantkit.calibration.outliers import outlier_ratio
from quantkit.calibration.statistics import KeyStatistics
from quantkit.methods import fireq
from quantkit.models.folding import fold_rope_factor
from quantkit.models.groups import Attention
from quantkit.recipe import Recipe

_SCALE_TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


class _Choice(NamedTuple):
    alpha: float | None
    strength: float
    beta: float | None
    top_k: Any


def scale_keys(
    layer: nn.Module,
    recipe: Recipe,
    attention: Attention,
    keys: KeyStatistics,
    *,
    exact: bool = False,
) -> tuple[torch.Tensor | None, dict[str, Any], dict[str, float]]:
    """Fold the factor before RoPE into the layer, and find the one after it.

    Where the recipe gives several settings, those with the least error of attention's output are taken, with
    queries, keys and values rounded.

    Args:
        exact: only powers of two before RoPE: weights that stay in 16 bits hold those exactly.

    Returns:
        (the factor on keys after RoPE, float32 [KV heads, head_dim], or None; the settings taken; how far
        channels stand out before and after).
    """
    assert recipe.rope_scaling
    scaling = recipe.rope_scaling
    alphas: list[float | None] = [None] if scaling.alpha is None else [*scaling.alpha]
    betas: list[float | None] = [None] if scaling.beta is None else [*scaling.beta]
    choices = [
        _Choice(*values)
        for values in itertools.product(alphas, scaling.strength, betas, scaling.top_k)
    ]
    choices = [
        c._replace(top_k=attention.head_dim if c.top_k == "all" else c.top_k) for c in choices
    ]
    # Without channels to take, beta says nothing: one such choice is enough.
    choices = [c for c in choices if c.top_k or c.beta == choices[0].beta]
    found = [_factors(keys, choice, exact) for choice in choices]
    best, errors = 0, []
    if len(found) > 1:
        errors = [_error(recipe, keys, pre, post) for pre, post, _ in found]
        best = errors.index(min(errors))
    pre, post, taken = found[best]
    assert keys.absmax is not None
    after = keys.absmax
    if scaling.alpha is not None:
        applied = fold_rope_factor(layer, pre, attention)
        # A pre factor shared by all heads can reach channels that a head's post factor takes.
        post = torch.where(taken, post / applied, post)
        after = after * applied
    used = post if scaling.beta is not None and any(scaling.top_k) else None
    outliers = {
        "before": outlier_ratio(keys.absmax),
        "after": outlier_ratio(after if used is None else after * used),
    }
    return used, choices[best]._asdict() | ({"errors": errors} if errors else {}), outliers


def _factors(
    keys: KeyStatistics, choice: _Choice, exact: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the factor before RoPE, the one after it, which channels the latter takes), all [KV heads, head_dim]."""
    assert keys.absmax is not None
    assert keys.pairs is not None
    pre, post = torch.ones_like(keys.absmax), torch.ones_like(keys.absmax)
    taken = torch.zeros_like(keys.absmax, dtype=torch.bool)
    if choice.beta is not None and choice.top_k:
        post, taken = fireq.rope_post_factor(keys.absmax, choice.beta, choice.top_k)
    if choice.alpha is not None:
        pre = fireq.rope_pre_factor(keys.pairs, choice.alpha, choice.strength)
        if exact:
            pre = torch.exp2(torch.log2(pre).round())
    return torch.where(taken, torch.ones_like(pre), pre), post, taken


def _error(recipe: Recipe, keys: KeyStatistics, pre: torch.Tensor, post: torch.Tensor) -> float:
    assert recipe.kv_cache
    total = sum(
        fireq.attention_error(
            *sample,
            pre * post,
            _SCALE_TYPES[recipe.kv_cache.scale],
            quantize_query=recipe.kv_cache.query == "fp8",
        )
        for sample in keys.samples
    )
    return float(total)
