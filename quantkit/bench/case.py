"""One measurement to make."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantkit.bench.timing import Run


@dataclass(frozen=True)
class Case:
    """An op at one size, in several ways.

    Attributes:
        op: its name.
        size: inputs x outputs, or what else tells cases of an op apart.
        rows: tokens; of attention, tokens in the cache.
        runs: way -> call; `quantkit` and `bf16` are always there.
        bytes, operations: the least that the quantized way must move and compute.
        operands: the type in which it multiplies: bf16, int8 or fp8.
        skipped: ways that could not be made, with the reason.
    """

    op: str
    size: str
    rows: int
    runs: dict[str, Run]
    bytes: float
    operations: float
    operands: str
    skipped: list[str] = field(default_factory=list)
