"""Experts that few calibration tokens reached: what they are quantized with instead of their own statistics."""

from __future__ import annotations

from typing import Any

from quantkit.calibration.statistics import InputStatistics
from quantkit.models.groups import InputGroup

# Below this a Hessian says more of the tokens that happened to come than of those that will.
MIN_TOKENS = 256


def is_starved(group: InputGroup, inputs: dict[str, InputStatistics]) -> bool:
    """Whether an expert's own input was seen too seldom for a factor; other groups see every token."""
    return group.name != group.place and inputs[group.name].tokens < MIN_TOKENS


def statistics_of(
    group: InputGroup, linear: str, inputs: dict[str, InputStatistics]
) -> tuple[InputStatistics | None, dict[str, Any]]:
    """What a linear is quantized with, and what the report says of it.

    An expert that saw at least `MIN_TOKENS` tokens has its own statistics. With fewer, its first linears share
    those of all tokens that the layer saw (`fallback: shared`), and its last is rounded to nearest
    (`fallback: nearest`): what it would have read is known for no other token.

    Returns:
        (statistics or None, figures: `tokens` and `fallback`, of experts alone).
    """
    if group.name not in inputs:
        return None, {}
    part = next((part for part in group.parts if linear in part.linears), group)
    own = inputs[part.name]
    if part.name == part.place:
        return own, {}
    if own.tokens >= MIN_TOKENS:
        return own, {"tokens": own.tokens}
    if part is not group:
        return inputs[group.name], {"tokens": own.tokens, "fallback": "shared"}
    return None, {"tokens": own.tokens, "fallback": "nearest"}
