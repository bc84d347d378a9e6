"""Line charts as inline SVG: drawn once on the server's side, readable without scripts, coloured by the page's CSS variables.

Shapes: all positions in SVG units; a chart is `width` x `height` of them, the plot area lies inside `_Frame`.
Colours and fonts are classes (see report.STYLE), so one picture serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from markupsafe import Markup

from deltune.training.curves import thin

HOVERS = 96  # columns that answer the pointer
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 20, 26


@dataclass(frozen=True)
class Series:
    """One curve. `style`: line, faint (behind a line) or points (marked and joined); `color` 1 to 3."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 1
    style: str = "line"


@dataclass(frozen=True)
class _Axis:
    """A value range laid on SVG units from `start` to `stop`, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (at - low) / (high - low) * (self.stop - self.start)


@dataclass(frozen=True)
class _Frame:
    x: _Axis
    y: _Axis
    x_ticks: list[float] = field(default_factory=list)
    y_ticks: list[float] = field(default_factory=list)


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that lie in [low, high], about `target` of them."""
    if not high > low:
        return [low]
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / target))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(span / step - target))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; with 2 and 5 between them where there are few; every second or third where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    factors = (1.0, 2.0, 5.0) if decades <= 3 else (1.0,)
    stride = max(1, math.ceil(decades / 7))
    ticks = [m * 10.0**e for e in range(first, last + 1, stride) for m in factors]
    return [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]


def tick_label(value: float, largest: float | None = None) -> str:
    """0, 120, 1.5k, 2e-4: short enough for a margin. `largest` is that of the same axis, so that its ticks look alike."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e4 or (size >= 1000 and value % 1000 == 0):
        power = min(5, int(math.log10(size) + 1e-9) // 3)
        return f"{value / 1000**power:.4g}{('', 'k', 'M', 'G', 'T', 'P')[power]}"
    if (largest or size) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.6g}"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    width: int = 460,
    height: int = 220,
    log: bool = False,
    from_zero: bool = False,
    written: Callable[[float], str] = tick_label,
) -> Markup:
    """The `<svg>` element. Not-finite values leave a gap. `written` writes a value in what the pointer shows.

    `from_zero` begins the vertical axis at zero; `log` needs values above zero and leaves out others.
    """
    drawn = [replace(s, y=[v if math.isfinite(v) and (v > 0 or not log) else math.nan for v in s.y]) for s in series]
    drawn = [s for s in drawn if any(map(math.isfinite, s.y))]
    if not drawn:
        return Markup('<p class="empty">No values of {} yet.</p>').format(title.lower())
    frame = _frame(drawn, width, height, log, from_zero)
    parts = [_grid(frame, width, height), *(_curve(s, frame) for s in drawn), _hovers(drawn, frame, width, height, written)]
    label = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, _summary(title, drawn, written))
    return label + Markup("").join(parts) + Markup("</svg>")


def _frame(series: Sequence[Series], width: int, height: int, log: bool, from_zero: bool) -> _Frame:
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for y in s.y if math.isfinite(y)]
    low, high = min(ys), max(ys)
    if log:
        low, high = low / 1.1, high * 1.1
    else:
        low = 0.0 if from_zero and low >= 0 else low
        # a flat curve still needs a height
        margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = low if low == 0 else low - margin, high + margin
    left, right = min(xs), max(xs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    x = _Axis(left, right, LEFT, width - RIGHT)
    y = _Axis(low, high, height - BOTTOM, TOP, log)
    x_ticks = [t for t in nice_ticks(left, right, max(3, width // 90)) if t == int(t)]
    return _Frame(x, y, x_ticks, log_ticks(low, high) if log else nice_ticks(low, high, max(3, height // 50)))


def _grid(frame: _Frame, width: int, height: int) -> Markup:
    largest = None if frame.y.log else max(map(abs, frame.y_ticks))
    horizontal = Markup("").join(
        Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT, width - RIGHT, y, y, LEFT - 7, y + 4, tick_label(tick, largest)
        )
        for tick, y in ((tick, frame.y.place(tick)) for tick in frame.y_ticks)
    )
    vertical = Markup("").join(
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(frame.x.place(tick), height - 8, tick_label(tick))
        for tick in frame.x_ticks
    )
    floor = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
        LEFT, width - RIGHT, height - BOTTOM, height - BOTTOM
    )
    return Markup('<g class="grid">{}{}{}</g>').format(horizontal, vertical, floor)


def _curve(series: Series, frame: _Frame) -> Markup:
    xs, ys = thin(series.x, series.y)
    dots = Markup("").join(
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"/>').format(frame.x.place(x), frame.y.place(y))
        for x, y in zip(xs, ys, strict=True)
        if math.isfinite(y) and series.style == "points"
    )
    path, pen = [], "M"
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if not math.isfinite(y):
            pen = "M"
            continue
        path.append(f"{pen}{frame.x.place(x):.1f} {frame.y.place(y):.1f}")
        alone = pen == "M" and (i + 1 == len(ys) or not math.isfinite(ys[i + 1]))
        # a point between two gaps would be invisible: round caps draw a line of no length
        path += ["h0"] if alone else []
        pen = "L"
    return Markup('<g class="{} c{}"><path d="{}"/>{}</g>').format(series.style, series.color, "".join(path), dots)


def _hovers(series: Sequence[Series], frame: _Frame, width: int, height: int, written: Callable[[float], str]) -> Markup:
    """Columns over the plot; the one under the pointer shows a step in it and every curve's value there."""
    values = [(s.name, dict(zip(s.x, s.y, strict=True))) for s in series]
    # a column with a marked point speaks of that point, others of their middle
    marked = {x for s in series if s.style == "points" for x in s.x}
    xs = sorted({x for s in series for x in s.x})
    stride = math.ceil(len(xs) / HOVERS)
    chunks = [xs[i : i + stride] for i in range(0, len(xs), stride)]
    chosen = [next((x for x in chunk if x in marked), chunk[len(chunk) // 2]) for chunk in chunks]
    places = [frame.x.place(x) for x in chosen]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(places)), width - RIGHT]
    columns = []
    for x, place, (begin, end) in zip(chosen, places, pairwise(edges), strict=True):
        text = " · ".join([f"step {x:g}", *(f"{name} {written(known[x])}" for name, known in values if x in known)])
        columns.append(
            Markup(
                '<g><title>{}</title><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>'
                '<line x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/><text x="{}" y="12" text-anchor="end">{}</text></g>'
            ).format(text, begin, TOP, end - begin, height - TOP - BOTTOM, place, place, TOP, height - BOTTOM, width - RIGHT, text)
        )
    return Markup('<g class="hover">{}</g>').format(Markup("").join(columns))


def _summary(title: str, series: Sequence[Series], written: Callable[[float], str]) -> str:
    """One sentence for those who cannot see the picture."""
    parts = []
    for s in series:
        finite = [y for y in s.y if math.isfinite(y)]
        parts.append(f"{s.name} from {written(finite[0])} to {written(finite[-1])}")
    return f"{title}: " + ", ".join(parts)
