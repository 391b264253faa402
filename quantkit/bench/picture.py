"""Throughput over the number of rows and over the context's length, as a PNG."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from quantkit.bench.attention import OPS as ATTENTION
from quantkit.bench.ops import BASELINE, LINEARS, OURS
from quantkit.errors import QuantkitError

_Lines = dict[str, dict[int, float]]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the results of a `bench ops` report, as its JSON has them.

    Raises:
        QuantkitError: the file cannot be written, or there is nothing to draw.
    """
    from matplotlib.figure import Figure

    linears = _over_rows(report["results"])
    attention = _over_context(report["results"])
    panels = [
        (linears, "Linear layers, all sizes together", "rows (M)", "TFLOP/s"),
        (attention, "Attention, one query a sequence", "tokens in the cache", "tokens read per µs"),
    ]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        raise QuantkitError(
            "--picture: no linear layer and no attention was timed; add such an --op"
        )
    figure = Figure(figsize=(7 * len(panels), 4.8), layout="constrained")
    for place, (lines, title, across, up) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for name, points in lines.items():
            style: dict[str, Any] = (
                {"color": "black", "linestyle": "--"} if name == BASELINE else {"marker": "o"}
            )
            axes.plot(list(points), list(points.values()), label=name, **style)
        axes.set(title=title, xlabel=across, ylabel=up, ylim=(0, None))
        axes.set_xscale("log", base=2)
        ticks = sorted({x for points in lines.values() for x in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    machine = report["machine"]
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    figure.suptitle(f"{machine['device']}{threads}, torch {machine['torch']}", fontsize=9)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise QuantkitError(f"{path}: cannot be written ({error})") from None


def _over_rows(results: list[dict[str, Any]]) -> _Lines:
    """Op -> rows -> operations per second over the sizes' sum; `bf16` from the first op's runs."""
    spent: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    first = next((r["op"] for r in results if r["op"] in LINEARS), None)
    for result in results:
        if result["op"] not in LINEARS:
            continue
        names = {result["op"]: OURS} | ({BASELINE: BASELINE} if result["op"] == first else {})
        for label, way in names.items():
            total = spent[label][result["rows"]]
            total[0] += result["operations"]
            total[1] += result["seconds"][way]["median"]
    return {
        label: {m: work / time / 1e12 for m, (work, time) in sorted(rows.items())}
        for label, rows in spent.items()
    }


def _over_context(results: list[dict[str, Any]]) -> _Lines:
    lines: _Lines = defaultdict(dict)
    for result in results:
        if result["op"] in ATTENTION and result["size"].startswith("decode"):
            batch = int(result["size"].rsplit(" ", 1)[1])
            for label, way in ((result["op"], OURS), (BASELINE, BASELINE)):
                seconds = result["seconds"][way]["median"]
                lines[label][result["rows"]] = batch * result["rows"] / seconds / 1e6
    return dict(lines)
