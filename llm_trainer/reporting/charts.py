"""Line charts as inline SVG, without a library and without network access.

They are sharp on paper and on any screen, and coloured by the page's own CSS variables. A plotting library
would add a dependency of tens of megabytes, or a script from a server, to draw four polylines.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

HEIGHT = 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 14, 36
MAX_POINTS = 600

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: Its name in the legend.
        colour: Its number in the page's palette, 1 to 4.
        points: (x, y), in the order of x.
        faint: Draw it as a background, without values under the pointer.
        dots: Draw a dot at each point.
    """

    label: str
    colour: int
    points: Points
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart with a title.

    Attributes:
        title: The title.
        unit: The unit of the values, shown under the pointer.
        width: The width in pixels, at which text has the size of the page's text.
        series: The lines.
        clip_top: The axis ends at this quantile of all values, so that a steep start does not flatten the
            rest.
        from_zero: Start the vertical axis at 0.
        marks: (step, text) of events: vertical lines whose text shows under the pointer.
    """

    title: str
    unit: str
    width: int
    series: Sequence[Series] = field(default_factory=tuple)
    clip_top: float = 1.0
    from_zero: bool = False
    marks: Sequence[tuple[float, str]] = ()


def downsample(points: Points, limit: int = MAX_POINTS) -> Points:
    """Reduce points to about `limit`: the lowest and highest of each bucket, so that spikes stay visible."""
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= limit:
        return finite
    size = math.ceil(2 * len(finite) / limit)
    kept: Points = []
    for start in range(0, len(finite), size):
        bucket = finite[start : start + size]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept


def smooth(points: Points, fraction: float = 0.03) -> Points:
    """Return the mean over a centred window of a fraction of all points, narrower at both ends.

    Unlike a running average it does not lag.
    """
    finite = [point for point in points if math.isfinite(point[1])]
    sums = [0.0, *itertools.accumulate(y for _, y in finite)]
    half = int(fraction * len(finite) / 2)
    smoothed = []
    for number, (x, _) in enumerate(finite):
        reach = min(half, number, len(finite) - 1 - number)
        smoothed.append((x, (sums[number + reach + 1] - sums[number - reach]) / (2 * reach + 1)))
    return smoothed


def axis_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (multiples of 1, 2 or 5 times a power of ten) in [low, high]."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def format_number(number: float) -> str:
    """Format a number briefly for axes and tables: 1234567 → 1.23M, 0.0003 → 3e-4."""
    size = abs(number)
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= scale * 0.9995:
            return f"{number / scale:.3g}{letter}"
    if size and size < 0.001:
        mantissa, exponent = f"{number:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{number:.4g}"


def render_chart(chart: Chart) -> str:
    """Return a chart as an HTML `<figure>`; empty if no series has a finite point."""
    lines = [(series, downsample(series.points)) for series in chart.series]
    lines = [(series, points) for series, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    plot = _Plot(
        chart.width,
        (min(xs), max(max(xs), min(xs) + 1)),
        _range([y for _, points in lines for _, y in points], chart),
    )
    name = f"plot-{zlib.crc32(chart.title.encode())}"
    shapes = [
        *_axes(plot),
        *_marks(plot, chart.marks),
        *(
            shape
            for series, points in lines
            for shape in _line(series, [plot.to_pixels(*point) for point in points], name)
        ),
    ]
    inside = (
        f'x="{LEFT}" y="{TOP - 4}" width="{plot.right_edge - LEFT + 4}" height="{HEIGHT - TOP - BOTTOM + 4}"'
    )
    clip = f'<clipPath id="{name}"><rect {inside}/></clipPath>'
    legend = "".join(
        f'<span class="key c{series.colour}{" faint" if series.faint else ""}">{escape(series.label)}</span>'
        for series, _ in lines
    )
    return (
        f'<figure class="chart" data-chart="{_payload(chart, plot, lines)}">'
        f"<figcaption><b>{escape(chart.title)}</b> {legend}</figcaption>"
        f'<svg viewBox="0 0 {chart.width} {HEIGHT}" role="img" '
        f'aria-label="{escape(chart.title, quote=True)}">{clip}{"".join(shapes)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
        '<div class="tip" hidden></div></figure>'
    )


@dataclass(frozen=True)
class _Plot:
    """The area inside the axes: its width in pixels, the range of x and the range of y."""

    width: int
    across: tuple[float, float]
    up: tuple[float, float]

    @property
    def right_edge(self) -> int:
        return self.width - RIGHT

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        """The pixels of a point, from the upper left."""
        (left, right), (low, high) = self.across, self.up
        from_left = LEFT + (x - left) / (right - left) * (self.right_edge - LEFT)
        return from_left, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _payload(chart: Chart, plot: _Plot, lines: list[tuple[Series, Points]]) -> str:
    """The values that the page's script shows under the pointer, as an attribute."""
    series = [
        {"label": one.label, "points": [(x, round(y, 6)) for x, y in points]}
        for one, points in lines
        if not one.faint
    ]
    data = {
        "unit": chart.unit,
        "left": LEFT,
        "right": plot.right_edge,
        "width": chart.width,
        "x": plot.across,
        "series": series,
    }
    return escape(json.dumps(data), quote=True)


def _range(values: list[float], chart: Chart) -> tuple[float, float]:
    ordered = sorted(values)
    low = 0.0 if chart.from_zero else ordered[0]
    high = ordered[min(len(ordered) - 1, int(chart.clip_top * len(ordered)))]
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    margin = (high - low) * 0.06
    return (low if chart.from_zero else low - margin), high + margin


def _axes(plot: _Plot) -> Iterator[str]:
    for value in axis_ticks(*plot.up):
        y = plot.to_pixels(plot.across[0], value)[1]
        label = format_number(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{plot.right_edge}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    for value in axis_ticks(*plot.across, count=max(4, plot.width // 140)):
        x = plot.to_pixels(value, plot.up[0])[0]
        label = format_number(value)
        yield f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>'
    yield f'<text class="tick" x="{plot.right_edge}" y="{HEIGHT - 3}" text-anchor="end">step</text>'


def _marks(plot: _Plot, marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    """A vertical line at each event."""
    for step, text in marks:
        if plot.across[0] <= step <= plot.across[1]:
            x = plot.to_pixels(step, plot.up[0])[0]
            line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            circle = f'<circle class="mark" cx="{x:.1f}" cy="{TOP}" r="4"/>'
            yield f"<g><title>{escape(text)}</title>{line}{circle}</g>"


def _line(series: Series, pixels: Points, name: str) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    shape = [
        f'<polyline class="line c{series.colour}{" faint" if series.faint else ""}" '
        f'clip-path="url(#{name})" points="{path}"/>'
    ]
    if series.dots or len(pixels) == 1:
        shape += [
            f'<circle class="dot c{series.colour}" clip-path="url(#{name})" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
            for x, y in pixels
        ]
    return shape
