"""Pictures as inline SVG. Colours are the page's variables, so that one picture suits light, dark and paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

Format = Callable[[float], str]
Values = list[float | None]

# Room around the plotting area: left for the axis' numbers, below for the layers' numbers.
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 10, 34
# The first of two series is what was, in grey; the second what is, in the colour of all single ones.
SERIES = ("b", "a", "c")


def bars(values: Values, form: Format, *, label: str, width: int = 720, height: int = 210) -> str:
    """One bar per layer; a layer without a value has none."""
    top = max((v for v in values if v is not None), default=0) or 1
    plot = _Plot(width, height, len(values), 0, top, log=False)
    parts = plot.axes(form)
    step = plot.inner_width / len(values)
    for n, value in enumerate(values):
        if value is not None:
            y = plot.y(value)
            parts.append(
                f'<rect class="fill-a" x="{plot.x(n) - step * 0.38:.1f}" y="{y:.1f}" width="{step * 0.76:.1f}" '
                f'height="{max(plot.bottom - y, 0.5):.1f}"><title>layer {n}: {escape(form(value))}</title></rect>'
            )
    return _svg(width, height, label, parts)


def lines(
    series: dict[str, Values], form: Format, *, label: str, width: int = 352, height: int = 170
) -> str:
    """A line per series over the layers; logarithmic where the values span more than a decade."""
    every = [v for values in series.values() for v in values if v is not None]
    low, high = min(every), max(every)
    log = low > 0 and high / low > 10
    plot = _Plot(width, height, max(map(len, series.values())), low if log else 0, high or 1, log)
    parts = plot.axes(form)
    for kind, (name, values) in zip(SERIES, series.items()):
        points = [(plot.x(n), plot.y(v), n, v) for n, v in enumerate(values) if v is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        parts.append(f'<polyline class="line-{kind}" points="{path}"/>')
        radius = 2.6 if len(points) <= 32 else 1.4
        parts += [
            f'<circle class="fill-{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>layer {n}, {escape(name)}: {escape(form(v))}</title></circle>"
            for x, y, n, v in points
        ]
    return _svg(width, height, label, parts)


def heat(rows: dict[str, Values], form: Format, *, label: str, width: int = 720) -> str:
    """A cell per row and layer, the darker the larger; with its number where there is room."""
    every = [v for values in rows.values() for v in values if v is not None]
    low, high = min(every), max(every)
    columns, left, cell = max(map(len, rows.values())), 132, 22
    step = (width - left - _RIGHT) / columns
    bottom = cell * len(rows)
    parts = []
    for line, (name, values) in enumerate(rows.items()):
        middle = line * cell + cell / 2 + 4
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>'
        )
        for n, value in enumerate(values):
            if value is None:
                continue
            # Shades for what differs by a hundredth would show a difference that is none.
            share = (value - low) / (high - low) if high > 1.01 * low else 0.25
            x = left + n * step
            parts.append(
                f'<rect class="fill-a" fill-opacity="{0.14 + 0.76 * share:.2f}" x="{x:.1f}" y="{line * cell}" '
                f'width="{max(step - 1, 0.5):.1f}" height="{cell - 1}"><title>layer {n}, {escape(name)}: '
                f"{escape(form(value))}</title></rect>"
            )
            if step >= 44:
                ink = "on-dark" if share > 0.55 else "on-light"
                parts.append(
                    f'<text class="{ink}" x="{x + step / 2:.1f}" y="{middle}" text-anchor="middle">'
                    f"{escape(form(value))}</text>"
                )
    parts += _layer_numbers(columns, lambda n: left + (n + 0.5) * step, bottom + 14)
    parts.append(_axis_title(left + (width - left - _RIGHT) / 2, bottom + 28))
    return _svg(width, bottom + 34, label, parts)


def shares(parts_of: dict[str, float], form: Format, *, label: str, width: int = 720) -> str:
    """One bar cut into parts, the largest first, each named below."""
    total = sum(parts_of.values()) or 1
    ordered = sorted(parts_of.items(), key=lambda item: -item[1])
    parts, x, at, line = [], 0.0, 0.0, 52
    for number, (name, value) in enumerate(ordered):
        opacity = max(0.95 - 0.16 * number, 0.15)
        span = value / total * width
        title = f"{escape(name)}: {escape(form(value))} ({value / total:.0%})"
        parts.append(
            f'<rect class="fill-a" fill-opacity="{opacity:.2f}" x="{x:.1f}" y="0" '
            f'width="{max(span - 1, 0.5):.1f}" height="30"><title>{title}</title></rect>'
        )
        x += span
        room = 7 * len(title) + 34
        if at + room > width:
            at, line = 0, line + 20
        parts.append(
            f'<rect class="fill-a" fill-opacity="{opacity:.2f}" x="{at:.0f}" y="{line - 10}" width="12" height="12"/>'
            f'<text class="tick" x="{at + 18:.0f}" y="{line}">{title}</text>'
        )
        at += room
    return _svg(width, line + 8, label, parts)


def beside(
    rows: list[tuple[str, float, float | None, str]], *, label: str, width: int = 720
) -> str:
    """Horizontal bars (name, value, standard error, words); the first is the original's."""
    left, right, cell = 150, 170, 30
    top = max(value + (error or 0) for _, value, error, _ in rows) or 1
    scale = (width - left - right) / top
    parts = []
    for line, (name, value, error, words) in enumerate(rows):
        y, end = line * cell + 4, left + value * scale
        kind = "b" if line == 0 and len(rows) > 1 else "a"
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="fill-{kind}" x="{left}" y="{y}" width="{max(value * scale, 1):.1f}" height="20"/>'
        )
        reach = end
        if error:
            low, reach = end - error * scale, end + error * scale
            parts.append(
                f'<path class="whisker" d="M{low:.1f},{y + 10}H{reach:.1f}M{low:.1f},{y + 6}v8M{reach:.1f},{y + 6}v8"/>'
            )
        parts.append(
            f'<text class="number" x="{reach + 8:.1f}" y="{y + 15}">{escape(words)}</text>'
        )
    return _svg(width, cell * len(rows) + 4, label, parts)


class _Plot:
    """Coordinates of a plot over layers."""

    def __init__(self, width: int, height: int, count: int, low: float, high: float, log: bool):
        self.width, self.count, self.log = width, count, log
        self.bottom = height - _BOTTOM
        self.inner_width = width - _LEFT - _RIGHT
        self.ticks = log_ticks(low, high) if log else ticks(low, high)
        self.low = min(low, self.ticks[0]) if log else low
        self.high = max(high, self.ticks[-1])

    def x(self, n: float) -> float:
        return _LEFT + (n + 0.5) * self.inner_width / self.count

    def y(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.bottom - share * (self.bottom - _TOP)

    def axes(self, form: Format) -> list[str]:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(form(tick))}</text>'
            )
        parts += _layer_numbers(self.count, self.x, self.bottom + 14, self.inner_width)
        parts.append(_axis_title(_LEFT + self.inner_width / 2, self.bottom + 28))
        return parts


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from low to at least high."""
    raw = (high - low) / 4 or 1
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    count = math.ceil((high - low) / step - 1e-9)
    return [low + n * step for n in range(count + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each decade, or powers of ten where those are too many, around low and high."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = (1, 2, 5) if last - first <= 2 else (1,)
    every = [m * 10.0**power for power in range(first, last + 1) for m in marks]
    below = max((t for t in every if t <= low * (1 + 1e-9)), default=every[0])
    above = min((t for t in every if t >= high * (1 - 1e-9)), default=every[-1])
    return [t for t in every if below <= t <= above]


def _layer_numbers(
    count: int, x: Callable[[int], float], y: float, width: float = 600
) -> list[str]:
    every = next(
        s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if count / s * 26 <= width or s == 1000
    )
    return [
        f'<text class="tick" x="{x(n):.1f}" y="{y:.1f}" text-anchor="middle">{n}</text>'
        for n in range(0, count, every)
    ]


def _axis_title(x: float, y: float) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">layer</text>'


def _svg(width: float, height: float, label: str, parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
