"""Charts as inline SVG in the page's colours. matplotlib computes the layout and draws; its colours are then replaced by the
page's CSS variables, so that one drawing works in light and in dark mode.

Pointing (or tapping) at a chart shows its numbers. This needs CSS only: the chart has invisible columns, each of which shows
its values while the pointer is over it.
"""

from __future__ import annotations

import io
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pretrain.telemetry.numbers import compact, is_number
from pretrain.telemetry.report.style import NUM_COLOURS, Markup, escape, join, key, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 34  # px around the axes, for the labels
SOFT, GRID = "#fd0000", "#fd0001"  # placeholders for --soft and --line; #fe00xx is the placeholder for colour xx
READOUTS, COLUMNS = 200, 70  # maximum number of values of all lines, and of steps, that one chart shows on hover
MARKED = 30  # a line with fewer points has a marker at each


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: Label in the legend.
        x: Steps.
        y: Values, as many as ``x``; ``None`` where a value is missing.
        colour: 0 … 9. The same quantity has the same colour in all charts of a page.
        dashed: Whether the line is dashed.
        low: Lower end of a band around the line, of the same length as ``x``, or empty.
        high: Upper end of the band.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    dashed: bool = False
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Point:
    """A marker at ``x``, ``y``.

    Attributes:
        name: Label of the point.
        x: Position on the x-axis.
        y: Position on the y-axis.
        colour: 0 … 9.
        strong: Whether the marker is larger and always shows its name; other names appear on hover.
    """

    name: str
    x: float
    y: float
    colour: int = 0
    strong: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of the x-axis, drawn as a strip under the curves: a phase of the run.

    Attributes:
        name: Description, shown when the pointer is over the strip.
        start: Where it begins on the x-axis.
        end: Where it ends.
    """

    name: str
    start: float
    end: float


Format = Callable[[float], str]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    x_label: str = "step",
    zero: bool = False,
    from_zero: bool = False,
    logarithmic: bool = False,
    large: bool = False,
    form: Format = compact,
    bands: Sequence[Band] = (),
) -> Markup:
    """Return a figure with one curve per line and a legend with the last values. The result is empty if no line has a number.

    ``unit`` is the unit of y, shown next to the title. ``zero`` draws the line y = 0; ``from_zero`` starts the y-axis at 0.
    ``large`` is the size for two charts in a row, otherwise three fit. ``form`` formats a value of y. ``bands`` are drawn under
    the curves.
    """
    lines = [line for line in lines if any(map(is_number, line.y))]
    if not lines:
        return Markup("")
    drawing = _Drawing(x_label, form, large=large, logarithmic=logarithmic)
    axes = drawing.axes
    for line in lines:
        colour = _colour(line.colour)
        marker = "o" if sum(map(is_number, line.y)) < MARKED else None
        style = (0, (4, 2)) if line.dashed else "-"
        axes.plot(line.x, _floats(line.y), color=colour, lw=1.7, ls=style, marker=marker, ms=3.4, zorder=3)
        if line.low:
            axes.fill_between(line.x, _floats(line.low), _floats(line.high), color=colour, alpha=0.16, lw=0)
    if zero:
        axes.axhline(0, color=SOFT, lw=1, zorder=2)
    if from_zero:
        axes.set_ylim(bottom=0)
    keys = [(line.name, line.colour, _last(line.y, form)) for line in lines]
    description = "; ".join(f"{line.name} from {_first(line.y, form)} to {_last(line.y, form)}" for line in lines)
    over = drawing.bands(bands) + drawing.readouts(lines)
    return _figure(title, unit, keys, drawing.svg(f"{title}: {description}", over), large=large)


def area_chart(
    title: str,
    lines: Sequence[Line],
    *,
    form: Format,
    unit: str = "",
    x_label: str = "step",
    large: bool = False,
    bands: Sequence[Band] = (),
) -> Markup:
    """Return a stacked area chart. All ``lines`` have the same ``x`` and no missing values. The legend shows the means."""
    drawing = _Drawing(x_label, form, large=large)
    colours = [_colour(line.colour) for line in lines]
    drawing.axes.stackplot(lines[0].x, [_floats(line.y) for line in lines], colors=colours, alpha=0.85, lw=0)
    drawing.axes.set_ylim(bottom=0)
    drawing.axes.margins(x=0)
    keys = [(line.name, line.colour, form(sum(_floats(line.y)) / len(line.y))) for line in lines]
    description = "; ".join(f"{name} {mean}" for name, _, mean in keys)
    over = drawing.bands(bands) + drawing.readouts(lines, marks=False)
    return _figure(title, unit, keys, drawing.svg(f"{title}: {description}", over), large=large)


def scatter_chart(
    title: str,
    points: Sequence[Point],
    *,
    x_label: str,
    unit: str = "",
    paths: Sequence[Sequence[tuple[float, float]]] = (),
    zero: bool = False,
    large: bool = False,
) -> Markup:
    """Return a scatter chart of named points. ``paths`` are polylines drawn through some of them. ``unit`` is the unit of y.
    ``zero`` draws the lines x = 0 and y = 0."""
    points = [p for p in points if is_number(p.x) and is_number(p.y)]
    if not points:
        return Markup("")
    drawing = _Drawing(x_label, compact, large=large)
    axes = drawing.axes
    axes.grid(axis="x", color=GRID, lw=0.8)
    for path in paths:
        axes.plot(*zip(*path, strict=True), color=SOFT, lw=1.2, ls=(0, (4, 2)), zorder=2)
    for p in points:
        axes.scatter([p.x], [p.y], s=70 if p.strong else 34, color=_colour(p.colour), zorder=3, linewidths=0)
    if zero:
        axes.axhline(0, color=SOFT, lw=1, zorder=1)
        axes.axvline(0, color=SOFT, lw=1, zorder=1)
    axes.margins(0.12)
    description = "; ".join(f"{p.name} at {compact(p.x)}, {compact(p.y)}" for p in points)
    return _figure(title, unit, [], drawing.svg(f"{title}: {description}", drawing.names(points)), large=large)


def heat_chart(
    title: str, rows: Sequence[str], x: Sequence[float], values: Sequence[Sequence[float | None]], *, unit: str = ""
) -> Markup:
    """Return a heat map with one row per name. ``values`` has one list per row; positive values are drawn on a logarithmic
    scale, the lowest darkest."""
    from matplotlib.colors import LogNorm

    numbers = [v for row in values for v in row if is_number(v) and v > 0]
    if not numbers or len(x) < 2:
        return Markup("")
    low, high = min(numbers), max(max(numbers), min(numbers) * 1.01)
    drawing = _Drawing("step", compact, left=70)
    drawing.axes.grid(visible=False)
    image = [[v if v > 0 else math.nan for v in _floats(row)] for row in values]
    extent = (x[0], x[-1], len(rows) - 0.5, -0.5)
    drawing.axes.imshow(
        image, aspect="auto", cmap="viridis", norm=LogNorm(low, high), interpolation="nearest", extent=extent
    )
    every = math.ceil(len(rows) / 12)
    drawing.axes.set_yticks(range(0, len(rows), every), [short(name) for name in rows[::every]], fontsize=9)
    description = f"{compact(low)} (dark) to {compact(high)} (bright)"
    return _figure(
        title, f"{unit}, {description}" if unit else description, [], drawing.svg(f"{title}: {description}", "")
    )


class _Drawing:
    """Axes in the style of the page, with the hover elements over them. All coordinates are px of the SVG, where y points
    down."""

    def __init__(
        self, x_label: str, form: Format, *, large: bool = False, logarithmic: bool = False, left: int = LEFT
    ) -> None:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.width, self.height = (440, 250) if large else (340, 205)
        self.form, self._x_label, self._left, self._font = form, x_label, left, 12 if large else 11
        self._figure = Figure(figsize=(self.width / 72, self.height / 72), dpi=72)
        FigureCanvasSVG(self._figure)
        across, up = (self.width - left - RIGHT) / self.width, (self.height - TOP - BOTTOM) / self.height
        self.axes: Axes = self._figure.add_axes((left / self.width, BOTTOM / self.height, across, up))
        self._style(logarithmic)
        place = (1 - RIGHT / self.width, 2 / self.height)
        self._figure.text(*place, x_label, fontsize=self._font - 1, color=SOFT, ha="right", va="bottom")

    def _style(self, logarithmic: bool) -> None:
        from matplotlib.ticker import MaxNLocator

        axes, steps = self.axes, [1, 2, 2.5, 5, 10]
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.tick_params(length=0, labelsize=self._font, labelcolor=SOFT, pad=5)
        axes.margins(x=0.015)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=steps))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        if logarithmic:
            axes.set_yscale("log")
            axes.minorticks_off()
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=steps))
        axes.yaxis.set_major_formatter(lambda value, _: self.form(value))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the px of a point of the axes. Call this after everything is drawn, because drawing changes the limits."""
        _ = self.axes.viewLim  # reading the limits makes matplotlib compute them
        across, up = self.axes.transData.transform((x, y))
        return float(across), self.height - float(up)

    def readouts(self, lines: Sequence[Line], *, marks: bool = True) -> str:
        """Return invisible columns over the axes; the column under the pointer shows its x and the value of every line."""
        places = sorted({x for line in lines for x, y in zip(line.x, line.y, strict=True) if is_number(y)})
        wanted = min(COLUMNS, max(8, READOUTS // len(lines)))
        if len(places) > wanted:
            places = [places[round(i * (len(places) - 1) / (wanted - 1))] for i in range(wanted)]
        borders = [-math.inf, *((a + b) / 2 for a, b in pairwise(places)), math.inf]
        columns = []
        for place, (left, right) in zip(places, pairwise(borders), strict=True):
            found = [(line, *point) for line in lines if (point := _nearest(line, place, left, right))]
            shown = [f"{self._x_label} {place:,.6g}", *(f"{line.name} {self.form(y)}" for line, _, y in found)]
            dots = [(*self.at(x, y), line.colour) for line, x, y in found] if marks else []
            sides = max(self._left, self.at(left, 1)[0]), min(self.width - RIGHT, self.at(right, 1)[0])
            columns.append(self._column(self.at(place, 1)[0], sides, shown, dots))
        return "".join(columns)

    def _column(
        self, x: float, sides: tuple[float, float], shown: list[str], dots: list[tuple[float, float, int]]
    ) -> str:
        anchor, offset = ("start", 7) if x < self.width / 2 else ("end", -7)
        rows = "".join(
            f'<text x="{x + offset:.1f}" y="{TOP + 11 + 14 * i}" text-anchor="{anchor}">{escape(text)}</text>'
            for i, text in enumerate(shown)
        )
        circles = "".join(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" style="fill:var(--c{c % NUM_COLOURS})"/>' for a, b, c in dots
        )
        bottom, (left, right) = self.height - BOTTOM, sides
        return (
            f'<g class="at"><rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{bottom}"/>'
            f'<path d="M{x:.1f} {TOP}V{bottom}"/>{circles}{rows}</g>'
        )

    def bands(self, bands: Sequence[Band]) -> str:
        """Return a strip just below the axes with one rectangle per band, as far as the axes show it."""
        low, high = self.axes.get_xlim()
        strip = []
        for number, band in enumerate(bands):  # in turns of two greys: the colours belong to the curves
            start, end = max(band.start, low), min(band.end, high)
            if start < end:
                left, right = self.at(start, 1)[0], self.at(end, 1)[0]
                strip.append(
                    f'<rect class="band" x="{left:.1f}" y="{self.height - BOTTOM + 1}" width="{right - left:.1f}" height="4" '
                    f'style="fill:var(--{("line", "soft")[number % 2]})"><title>{escape(band.name)}</title></rect>'
                )
        return "".join(strip)

    def names(self, points: Sequence[Point]) -> str:
        """Return the names of the points. Strong points always show their names, the others on hover."""
        marks = []
        for p in points:
            x, y = self.at(p.x, p.y)
            anchor, offset = ("start", 9) if x < self.width / 2 else ("end", -9)
            kind = "name" if p.strong else "at"
            name = f'<text x="{x + offset:.1f}" y="{y - 7:.1f}" text-anchor="{anchor}">{escape(p.name)}</text>'
            marks.append(
                f'<g class="{kind}"><rect x="{x - 10:.1f}" y="{y - 10:.1f}" width="20" height="20"/>{name}</g>'
            )
        return "".join(marks)

    def svg(self, description: str, over: str) -> str:
        """Return the drawing as SVG for an HTML page. ``over`` is SVG that is placed on top."""
        from matplotlib import rc_context

        text = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):  # text stays text; ids are reproducible
            self._figure.savefig(text, format="svg", transparent=True)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(description)}">'
            f'{_cleaned(text.getvalue())}<g aria-hidden="true">{over}</g></svg>'
        )


def _cleaned(svg: str) -> str:
    """Return matplotlib's SVG without its metadata and ids, in the page's font and colours."""
    inner = svg.partition("<defs>")[2].partition("</defs>")[2].rpartition("</svg>")[0]
    inner = re.sub(r"<g id=\"[^\"]*\">", "<g>", inner)  # nothing references these ids
    inner = re.sub(r"font-family: [^;\"]*;?", "", inner)
    inner = re.sub(r"\s+(?=[LMCz]\b|<)|(?<=>)\s+", "", inner)
    inner = re.sub(
        r"<[^>]+>", lambda tag: re.sub(r"(\.\d)\d{2,}", r"\1", tag[0]), inner
    )  # a precision of 0.1 px is enough
    inner = re.sub(r"#fe00([0-9a-f]{2})", lambda found: f"var(--c{int(found[1], 16)})", inner)
    return inner.replace(SOFT, "var(--soft)").replace(GRID, "var(--line)")


def _figure(title: str, unit: str, keys: Sequence[tuple[str, int, str]], svg: str, *, large: bool = False) -> Markup:
    small = f" <small>{escape(unit)}</small>" if unit else ""
    caption = f"<figcaption>{escape(title)}{small}</figcaption>"
    legend = join(key(*entry) for entry in keys)
    return Markup(
        f'<figure class="card{" large" if large else ""}">{caption}{svg}<div class="keys">{legend}</div></figure>'
    )


def _nearest(line: Line, x: float, left: float, right: float) -> tuple[float, float] | None:
    """Return the point of ``line`` between ``left`` and ``right`` that is nearest to ``x``, or ``None``."""
    first, last = bisect_left(line.x, left), bisect_left(line.x, right)
    points = [(a, b) for a, b in zip(line.x[first:last], line.y[first:last], strict=True) if is_number(b)]
    return min(points, key=lambda point: abs(point[0] - x), default=None)


def _floats(values: Iterable[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


def _first(values: Sequence[float | None], form: Format) -> str:
    return next(form(v) for v in values if is_number(v))


def _last(values: Sequence[float | None], form: Format) -> str:
    return _first(values[::-1], form)


def _colour(number: int) -> str:
    return f"#fe00{number % NUM_COLOURS:02x}"
