"""The pictures of a report: from what was noted per layer to a title, a few words and an SVG."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.report import svg
from quantkit.report.facts import Facts
from quantkit.report.svg import Values

_STAGES = {
    "embed": "embedding",
    "calibrate": "running calibration text",
    "quantize": "quantizing",
    "round": "rounding",
    "advance": "running quantized layers",
    "write": "writing layers",
    "copy": "copying the rest",
    "save": "saving the state",
    "verify": "verifying",
}
_PLACES = {
    "qkv": "input of q, k, v",
    "o": "input of o",
    "gate_up": "input of gate, up",
    "down": "input of down",
    "keys": "keys after RoPE",
}
_ZERO_NAMES = {
    "per_token": "as it was, per token",
    "folded": "as it is quantized here",
    "dynamic": "CrossQuant's dynamic form",
}
NO_CALIBRATION = (
    "This recipe needs no calibration: no text was run through the layers, so there is nothing to "
    "show. `quantkit eval` measures what is left of the model."
)


@dataclass(frozen=True)
class Panel:
    """One picture, with a name of its own where a section has several."""

    picture: str
    title: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page. Without panels it says in `words` why there is nothing to see."""

    id: str
    title: str
    words: str
    panels: list[Panel] = field(default_factory=list)
    legend: list[str] = field(default_factory=list)


def sections(facts: Facts) -> list[Section]:
    """Every section, in the page's order, also those that have nothing to show."""
    return [
        _perplexity(facts),
        _size(facts),
        _layer_error(facts),
        _linear_error(facts),
        _bits(facts),
        _outliers(facts),
        _zero_fraction(facts),
        _time(facts),
    ]


def _perplexity(facts: Facts) -> Section:
    found = facts.evaluation or {}
    if not found.get("ppl"):
        words = f"Not measured yet: `quantkit eval {facts.name}` does, and puts it here."
        return Section("perplexity", "Perplexity", words)
    panels = []
    for text, result in found["ppl"].items():
        rows = []
        original = (found.get("baseline") or {}).get(text)
        if original:
            rows.append((facts.base, original["ppl"], original["stderr"], f"{original['ppl']:.4f}"))
        ratio = f" ({result['ppl'] / original['ppl']:.4f} times)" if original else ""
        rows.append((facts.name, result["ppl"], result["stderr"], f"{result['ppl']:.4f}{ratio}"))
        title = f"{Path(text).name}: {result['windows']} windows of {result['seqlen']} tokens"
        rows = [(_short(n), v, e, w) for n, v, e, w in rows]
        panels.append(Panel(svg.beside(rows, label=f"Perplexity on {Path(text).name}"), title))
    words = (
        "Protocol gptq: the text tokenized once, consecutive windows, the last partial one dropped. "
        "Whiskers are one standard error over the windows; that of the ratio is far smaller, since both models "
        "read the same windows."
    )
    return Section("perplexity", "Perplexity", words, panels)


def _size(facts: Facts) -> Section:
    panels = []
    for key, title in (("linear_bytes", "Quantized linears"), ("total_bytes", "Whole checkpoint")):
        sizes = facts.report.get(key)
        if sizes and sizes["before"]:
            before, after = sizes["before"], sizes["after"]
            rows: list[tuple[str, float, float | None, str]] = [
                (_short(facts.base), before, None, in_bytes(before)),
                (_short(facts.name), after, None, f"{in_bytes(after)} ({after / before:.3f})"),
            ]
            panels.append(Panel(svg.beside(rows, label=title), title))
    return Section("size", "Size", "Bytes on disk, scales counted in.", panels)


def _layer_error(facts: Facts) -> Section:
    values: Values = [layer.get("output_error") for layer in facts.layers]
    title = "Output error of each layer"
    if not any(v is not None for v in values):
        return Section("layer-error", title, NO_CALIBRATION)
    words = (
        "Squared error of a quantized layer's output over what the original layer adds to its input, on calibration "
        "text. A layer's inputs are those that the quantized layers before it give, so errors add up."
    )
    return Section("layer-error", title, words, [Panel(svg.bars(values, percent, label=title))])


def _linear_error(facts: Facts) -> Section:
    title = "Error of each linear"
    for key, words in (
        ("output_error", "Squared error of each linear's output over the output, on calibration text."),
        ("weight_error", "Squared error of each weight over the weight: no calibration text was run."),
    ):  # fmt: skip
        rows = by_linear(facts.layers, key)
        if rows:
            return Section(
                "linear-error", title, words, [Panel(svg.heat(rows, percent, label=title))]
            )
    return Section("linear-error", title, NO_CALIBRATION)


def _bits(facts: Facts) -> Section:
    title, rows = "Bits of each weight", by_linear(facts.layers, "bits")
    if not rows:
        return Section("bits", title, "This report was written before bits were noted.")
    mean = facts.bits_per_weight
    words = "Bits on disk of each weight with its share of the scales" + (
        f"; {mean:.3f} on average." if mean else "."
    )
    return Section("bits", title, words, [Panel(svg.heat(rows, lambda v: f"{v:.3g}", label=title))])


def _outliers(facts: Facts) -> Section:
    title = "Outliers of activations and keys"
    found = by_place(facts.layers, "outliers", max)
    if not found:
        return Section("outliers", title, NO_CALIBRATION)
    words = (
        "The largest channel over the median one: of each input as it was, and as it is quantized, after factors were "
        "folded and rotations applied; of the keys in the head where it is largest."
    )
    panels = [
        Panel(
            svg.lines(
                {"before": kinds["before"], "after": kinds["after"]},
                lambda v: f"{v:.3g}",
                label=f"{title}: {place}",
            ),
            _PLACES.get(place, place),
        )
        for place, kinds in found.items()
    ]
    return Section("outliers", title, words, panels, ["before", "after"])


def _zero_fraction(facts: Facts) -> Section:
    title = "Activations that round to zero"
    found = by_place(facts.layers, "zero_fraction", _mean)
    if not found:
        words = (
            NO_CALIBRATION
            if not facts.report.get("calibration")
            else "Only integer activations have a share that rounds to zero; this recipe's have none."
        )
        return Section("zero-fraction", title, words)
    words = (
        "The share of nonzero activations that rounding loses, which CrossQuant's paper calls the quantization kernel; "
        "it finds models well below 1 % to lose little."
    )
    panels = [
        Panel(
            svg.lines(
                {_ZERO_NAMES[kind]: kinds[kind] for kind in _ZERO_NAMES if kind in kinds},
                percent,
                label=f"{title}: {place}",
            ),
            _PLACES.get(place, place),
        )
        for place, kinds in found.items()
    ]
    return Section("zero-fraction", title, words, panels, list(_ZERO_NAMES.values()))


def _time(facts: Facts) -> Section:
    stages = {k: v for k, v in (facts.report.get("stages") or {}).items() if v}
    total = facts.report.get("seconds")
    words = f"{in_seconds(total)} in all." if total else "Not recorded."
    if not stages:
        return Section("time", "Where the time went", words)
    named = {_STAGES.get(name, name): seconds for name, seconds in stages.items()}
    picture = svg.shares(named, in_seconds, label="Seconds of each stage")
    return Section("time", "Where the time went", words, [Panel(picture)])


def by_linear(layers: list[dict[str, Any]], key: str) -> dict[str, Values]:
    """Linear -> its figure in each layer; experts of a mixture together, as the mean of theirs."""
    gathered: dict[str, list[list[float]]] = {}
    for number, layer in enumerate(layers):
        for name, figures in layer.get("linears", {}).items():
            if key in figures:
                short = re.sub(r"\.\d+\.", ".*.", name.partition(".")[2] or name)
                gathered.setdefault(short, [[] for _ in layers])[number].append(figures[key])
    ordered = sorted(gathered, key=_rank)
    return {name: [_mean(v) if v else None for v in gathered[name]] for name in ordered}


def _rank(linear: str) -> int:
    """In the order in which a layer computes them, whatever order the checkpoint's files have."""
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    last = linear.rpartition(".")[2]
    return order.index(last) if last in order else len(order)


def by_place(layers: list[dict[str, Any]], key: str, join: Any) -> dict[str, dict[str, Values]]:
    """Input -> kind of figure -> its value in each layer; inputs of experts joined."""
    gathered: dict[str, dict[str, list[list[float]]]] = {}
    for number, layer in enumerate(layers):
        for place, kinds in (layer.get(key) or {}).items():
            short = next((p for p in _PLACES if place == p or place.startswith(f"{p}.")), place)
            for kind, value in kinds.items():
                each = gathered.setdefault(short, {}).setdefault(kind, [[] for _ in layers])
                each[number].append(value)
    ordered = sorted(gathered, key=lambda p: list(_PLACES).index(p) if p in _PLACES else 99)
    return {
        place: {
            kind: [join(v) if v else None for v in values]
            for kind, values in gathered[place].items()
        }
        for place in ordered
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _short(name: str) -> str:
    """A name that fits beside a bar."""
    return name if len(name) <= 22 else name[:9] + "\N{HORIZONTAL ELLIPSIS}" + name[-12:]


def percent(value: float) -> str:
    """A share with as many digits as it needs: 2.1%, 0.043%, 1.2e-5%."""
    if value == 0:
        return "0%"
    hundred = 100 * value
    return f"{hundred:.3g}%" if hundred >= 0.001 else f"{hundred:.1e}%"


def in_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def in_seconds(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
