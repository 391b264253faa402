"""A recipe and a target -> a recipe with rules that give each part of the model its width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from quantkit.allocation.knapsack import choose
from quantkit.allocation.sensitivity import Part, measure, parts_of
from quantkit.calibration.data import CalibrationSet
from quantkit.errors import QuantkitError
from quantkit.plan import Plan
from quantkit.ranks import ALONE, Ranks
from quantkit.recipe import Recipe, Rule, Weights

WIDTHS = (2, 3, 4, 5, 6, 8)
# Calibration blocks that sensitivities are measured on: they vary little from text to text.
SAMPLES = 8


@dataclass(frozen=True)
class Target:
    """What to reach: bits per weight of the quantized linears, scales included, or bytes of the whole checkpoint."""

    bits: float | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.bits:g} bits" if self.bits is not None else f"{self.bytes} bytes"


def widths_for(recipe: Recipe, widths: Sequence[int] | None = None) -> list[int]:
    """Those of the widths that the recipe's weights can have (FP8 group scales end at four bits).

    Raises:
        QuantkitError: one that was asked for cannot be had.
    """
    if recipe.weights is None:
        raise QuantkitError(f"recipe {recipe.name} leaves weights in 16 bits: no target can be met")
    possible = [b for b in sorted(set(widths or WIDTHS)) if _weights(recipe.weights, b) is not None]
    lacking = sorted(set(widths or ()) - set(possible))
    if lacking:
        raise QuantkitError(
            f"--widths {lacking[0]}: recipe {recipe.name} has no weights of {lacking[0]} bits; 2 to 8 there are, "
            "and 2 to 4 with FP8 group scales"
        )
    return possible


def find_target(bits: float | None, size: str | int | None) -> Target | None:
    """The target that a user gave, or None.

    Raises:
        QuantkitError: two were given, or one that is no positive number.
    """
    if bits is not None and size is not None:
        raise QuantkitError("--target-bits and --target-size: give one of them")
    if bits is not None:
        if not 0 < bits < float("inf"):
            raise QuantkitError(f"--target-bits {bits:g}: a positive number is expected, as 4.5")
        return Target(bits=bits)
    if size is None:
        return None
    return Target(bytes=size if isinstance(size, int) else parse_size(size))


def check_target(plan: Plan, target: Target, widths: list[int]) -> int:
    """The bytes that the quantized linears may take.

    Raises:
        QuantkitError: the target is below what the least width gives.
    """
    parts = parts_of(plan, widths)
    weights = sum(part.weights for part in parts)
    others = plan.total_bytes[1] - plan.linear_bytes[1]
    if target.bits is not None:
        budget = int(target.bits * weights / 8)
    else:
        budget = (target.bytes or 0) - others
    least = sum(min(part.sizes.values()) for part in parts)
    if not widths or budget < least:
        low = least * 8 / weights
        raise QuantkitError(
            f"{target}: cannot be met; at {widths[0] if widths else 'no'} bits everywhere the linears take {low:.3f} bits per "
            f"weight with their scales, the checkpoint {(least + others) / 1e9:.4g} GB; raise the target, or widen the groups"
        )
    return budget


def allocate(
    plan: Plan,
    target: Target,
    data: CalibrationSet,
    widths: list[int],
    device: torch.device,
    tell: Callable[[int, int, str], None],
    ranks: Ranks = ALONE,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with rules for the target, and what goes into the report.

    Raises:
        QuantkitError: the target cannot be met.
    """
    budget = check_target(plan, target, widths)
    parts = measure(plan, data.tokens[:SAMPLES], widths, device, tell, ranks)
    options = [[part.sizes[b] for b in widths] for part in parts]
    chosen = choose(options, [[part.costs[b] for b in widths] for part in parts], budget)
    bits = {part.name: widths[option] for part, option in zip(parts, chosen)}
    taken = sum(part.sizes[bits[part.name]] for part in parts)
    recipe = plan.recipe.model_copy(
        update={
            "name": f"{plan.recipe.name}-{_short(target)}",
            "rules": [*_rules(plan.recipe, parts, bits), *plan.recipe.rules],
        }
    )
    report = {
        "target": {"bits": target.bits, "bytes": target.bytes},
        "bits": taken * 8 / sum(part.weights for part in parts),
        "counted": "codes, scales and shapes of the quantized linears, over their weights",
        "widths": widths,
        "parts": {
            part.name: {
                "bits": bits[part.name],
                "costs": {str(b): c for b, c in part.costs.items()},
            }
            for part in parts
        },
    }
    return Recipe.model_validate(recipe.model_dump()), report


def _rules(recipe: Recipe, parts: list[Part], bits: dict[str, int]) -> list[Rule]:
    rules = []
    for part in parts:
        for name in part.linears:
            weights = _weights(recipe.weights_of(name), bits[part.name])
            assert weights is not None
            rule = recipe.rule_for(name)
            if weights != recipe.weights_of(name):
                rules.append(
                    Rule(
                        match=name, weights=weights, activations=rule.activations if rule else None
                    )
                )
    return rules


def _weights(weights: Weights | None, bits: int) -> Weights | None:
    if weights is None:
        return None
    try:
        return Weights.model_validate(weights.model_dump() | {"bits": bits})
    except ValidationError:
        return None


def _short(target: Target) -> str:
    if target.bits is not None:
        return f"{target.bits:g}bits"
    return f"{(target.bytes or 0) / 1e9:.4g}GB"


def parse_size(text: str) -> int:
    """Bytes of `3GB`, `700 MB` or `3000000`; powers of ten.

    Raises:
        QuantkitError: it is no size.
    """
    units = {"gb": 10**9, "mb": 10**6, "kb": 10**3, "b": 1}
    lower = text.strip().lower()
    unit = next((u for u in units if lower.endswith(u)), "")
    try:
        value = float(lower.removesuffix(unit))
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise QuantkitError(f"--target-size {text}: a size is expected, as 3GB or 700MB")
    return int(value * units.get(unit, 1))
