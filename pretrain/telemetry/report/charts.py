"""Charts as inline SVG in the page's colours: matplotlib lays out and draws; what it wrote as colours becomes the page's
variables, so that one drawing reads in light and in dark.

Numbers are read off by pointing (or tapping) at a chart. That is CSS alone: columns, each of which shows its values while the
pointer is over it.
"""

from __future__ import annotations

import io
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

from pretrain.telemetry.report.style import NUM_COLOURS, Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 400, 225  # px, before the page scales the drawing to its card
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34  # px around the axes, for the labels
INK, SOFT, GRID = "#000000", "#fd0000", "#fd0001"  # stand for --ink, --soft, --line; #fe00xx for the colour xx
READOUTS = 240  # values that can be pointed at in one chart, over all of its lines
MARKED = 30  # a line of fewer points shows each of them


@dataclass(frozen=True)
class Line:
    """``y``: as many numbers as ``x``, ``None`` where there is none. ``low`` and ``high``: a band around it, of the same
    length. ``colour``: 0 … 9, one that stays the same for a thing in all charts of a page."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int = 0
    dashed: bool = False
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Point:
    """A mark at ``x``, ``y``. ``strong``: larger, with its name beside it."""

    name: str
    x: float
    y: float
    colour: int = 0
    strong: bool = False


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
    form: Format | None = None,
) -> Markup:
    """A figure with a curve a line and a legend that says its last value; nothing when no line has a number.

    ``unit``: of y, beside the title. ``zero``: draw the line y = 0. ``from_zero``: the axis begins there. ``form``: a
    number of y in words.
    """
    lines = [line for line in lines if any(_is_number(v) for v in line.y)]
    if not lines:
        return Markup("")
    form = form or compact
    figure, axes = _axes(form, logarithmic=logarithmic)
    for line in lines:
        marker = "o" if sum(map(_is_number, line.y)) < MARKED else None
        style = (0, (4, 2)) if line.dashed else "-"
        axes.plot(
            line.x, _floats(line.y), color=_colour(line.colour), lw=1.7, ls=style, marker=marker, ms=3.4, zorder=3
        )
        if line.low:
            axes.fill_between(
                line.x, _floats(line.low), _floats(line.high), color=_colour(line.colour), alpha=0.16, lw=0
            )
    if zero:
        axes.axhline(0, color=SOFT, lw=1, zorder=2)
    if from_zero:
        axes.set_ylim(bottom=0)
    _label(figure, x_label)
    over = _readouts(axes, lines, x_label, form)
    keys = [(line.name, line.colour, _last(line.y, form)) for line in lines]
    said = "; ".join(f"{line.name} from {_first(line.y, form)} to {_last(line.y, form)}" for line in lines)
    return _figure(title, unit, keys, _svg(figure, f"{title}: {said}", over))


def area_chart(
    title: str, x: Sequence[float], parts: Sequence[Line], *, unit: str = "", x_label: str = "step", form: Format
) -> Markup:
    """Shares of a whole, one upon another; ``parts`` have numbers at every ``x``. The legend says each one's mean."""
    figure, axes = _axes(form)
    axes.stackplot(x, [_floats(part.y) for part in parts], colors=[_colour(p.colour) for p in parts], alpha=0.8, lw=0)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    _label(figure, x_label)
    means = [sum(_floats(part.y)) / len(part.y) for part in parts]
    keys = [(part.name, part.colour, form(mean)) for part, mean in zip(parts, means, strict=True)]
    said = "; ".join(f"{name} {mean}" for name, _, mean in keys)
    over = _readouts(axes, parts, x_label, form, marks=False)
    return _figure(title, unit, keys, _svg(figure, f"{title}: {said}", over))


def scatter_chart(
    title: str,
    points: Sequence[Point],
    *,
    x_label: str,
    unit: str = "",
    front: Sequence[tuple[float, float]] = (),
    zero: bool = False,
) -> Markup:
    """Points with their names; ``front``: corners of a line drawn through some of them. ``unit``: of y."""
    points = [p for p in points if _is_number(p.x) and _is_number(p.y)]
    if not points:
        return Markup("")
    figure, axes = _axes(compact)
    axes.grid(axis="x", color=GRID, lw=0.8)
    if front:
        axes.plot(*zip(*front, strict=True), color=SOFT, lw=1.2, ls=(0, (4, 2)), zorder=2)
    for p in points:
        axes.scatter([p.x], [p.y], s=70 if p.strong else 34, color=_colour(p.colour), zorder=3, linewidths=0)
    if zero:
        axes.axhline(0, color=SOFT, lw=1, zorder=1)
        axes.axvline(0, color=SOFT, lw=1, zorder=1)
    axes.margins(0.12)
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    _label(figure, x_label)
    said = "; ".join(f"{p.name} at {compact(p.x)}, {compact(p.y)}" for p in points)
    return _figure(title, unit, [], _svg(figure, f"{title}: {said}", _names(axes, points)))


def heat_chart(
    title: str, rows: Sequence[str], x: Sequence[float], values: Sequence[Sequence[float | None]], *, unit: str = ""
) -> Markup:
    """A row of colour a name, darkest at the lowest value; ``values``: positive, one list a row, on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    numbers = [v for row in values for v in row if _is_number(v) and v > 0]
    if not numbers or len(x) < 2:
        return Markup("")
    low, high = min(numbers), max(max(numbers), min(numbers) * 1.01)
    figure, axes = _axes(compact)
    axes.grid(visible=False)
    axes.imshow(
        [_floats(row) for row in values],
        aspect="auto",
        cmap="viridis",
        norm=LogNorm(low, high),
        interpolation="nearest",
        extent=(x[0], x[-1], len(rows) - 0.5, -0.5),
    )
    every = max(1, math.ceil(len(rows) / 12))
    axes.set_yticks(range(0, len(rows), every), [_short(name) for name in rows[::every]], fontsize=8)
    _label(figure, "step")
    said = f"{compact(low)} (dark) to {compact(high)} (bright)"
    return _figure(title, f"{unit} {said}".strip(), [], _svg(figure, f"{title}: {said}", ""))


def compact(value: float) -> str:
    """A number as an axis and a legend say it: 12k, 3.4M, 0.042, 1e-05."""
    size = abs(value)
    if size == 0 or not math.isfinite(value):
        return "0" if size == 0 else "—"
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return _sign(f"{value / factor:.3g}{letter}")
    return _sign(f"{value:.3g}")


def _sign(text: str) -> str:
    return text.replace("-", "−") if text.startswith("-") else text


def _short(name: str, length: int = 9) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _floats(values: Iterable[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


def _first(values: Sequence[float | None], form: Format) -> str:
    return next(form(v) for v in values if v is not None)


def _last(values: Sequence[float | None], form: Format) -> str:
    return _first(values[::-1], form)


def _colour(number: int) -> str:
    return f"#fe00{number % NUM_COLOURS:02x}"


def _axes(form: Format, *, logarithmic: bool = False) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
    FigureCanvasSVG(figure)
    axes = figure.add_axes(
        (LEFT / WIDTH, BOTTOM / HEIGHT, 1 - (LEFT + RIGHT) / WIDTH, 1 - (TOP + BOTTOM) / HEIGHT), axisbelow=True
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.tick_params(length=0, labelsize=11, labelcolor=SOFT, pad=5)
    axes.margins(x=0.015)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    if logarithmic:
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: form(value))
    return figure, axes


def _label(figure: Figure, text: str) -> None:
    figure.text(1 - RIGHT / WIDTH, 2 / HEIGHT, text, fontsize=10, color=SOFT, ha="right", va="bottom")


def _readouts(axes: Axes, lines: Sequence[Line], x_label: str, form: Format, *, marks: bool = True) -> str:
    """Columns over the axes; the one under the pointer shows its ``x`` and the value of every line there."""
    places = sorted({x for line in lines for x, y in zip(line.x, line.y, strict=True) if _is_number(y)})
    wanted = max(8, READOUTS // len(lines))
    if len(places) > wanted:
        places = [places[round(i * (len(places) - 1) / (wanted - 1))] for i in range(wanted)]
    at = [_pixels(axes, x, 0)[0] for x in places]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(at)), WIDTH - RIGHT]
    columns = []
    for i, place in enumerate(places):
        found = [(line, y) for line in lines if (y := _value_at(line, place)) is not None]
        shown = [f"{x_label} {place:,.6g}", *(f"{line.name} {form(y)}" for line, y in found)]
        dots = [(_pixels(axes, place, y)[1], line.colour) for line, y in found] if marks else []
        columns.append(_column(at[i], edges[i], edges[i + 1], shown, dots))
    return "".join(columns)


def _column(x: float, left: float, right: float, shown: list[str], dots: list[tuple[float, int]]) -> str:
    anchor, offset = ("start", 7) if x < WIDTH / 2 else ("end", -7)
    rows = "".join(
        f'<text x="{x + offset:.1f}" y="{TOP + 11 + 14 * i}" text-anchor="{anchor}">{escape(text)}</text>'
        for i, text in enumerate(shown)
    )
    circles = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:var(--c{c % NUM_COLOURS})"/>' for y, c in dots
    )
    bottom = HEIGHT - BOTTOM
    return (
        f'<g class="at"><rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{bottom}"/>'
        f'<path d="M{x:.1f} {TOP}V{bottom}"/>{circles}{rows}</g>'
    )


def _names(axes: Axes, points: Sequence[Point]) -> str:
    """The names of points: of the strong ones always, of the others under the pointer."""
    marks = []
    for p in points:
        x, y = _pixels(axes, p.x, p.y)
        anchor, offset = ("start", 9) if x < WIDTH / 2 else ("end", -9)
        text = f'<text x="{x + offset:.1f}" y="{y - 7:.1f}" text-anchor="{anchor}"{{}}>{escape(p.name)}</text>'
        if p.strong:
            marks.append(text.format(' style="font-size:11px;font-weight:600"'))
        else:
            side = f'<rect x="{x - 10:.1f}" y="{y - 10:.1f}" width="20" height="20"/>'
            marks.append(f'<g class="at">{side}{text.format("")}</g>')
    return "".join(marks)


def _value_at(line: Line, x: float) -> float | None:
    """The line's value at the point nearest to ``x``; ``None`` beyond its ends."""
    if not line.x or not line.x[0] <= x <= line.x[-1]:
        return None
    i = bisect_left(line.x, x)
    if i and x - line.x[i - 1] < line.x[i] - x:
        i -= 1
    y = line.y[i]
    return y if _is_number(y) else None


def _pixels(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Where a point of the axes lies in the SVG, whose y runs down."""
    across, up = axes.transData.transform((x, y))
    return float(across), HEIGHT - float(up)


def _svg(figure: Figure, description: str, over: str) -> str:
    """The drawing as a part of an HTML page; ``over``: more SVG on top."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):  # text stays text; ids that repeat
        figure.savefig(text, format="svg", transparent=True)
    inner = text.getvalue().partition("<defs>")[2].partition("</defs>")[2].rpartition("</svg>")[0]
    inner = re.sub(r"<g id=\"[^\"]*\">", "<g>", inner)  # ids are for references, and these have none
    inner = re.sub(r"font-family: [^;\"]*;?", "", inner)
    inner = re.sub(r"\s+(?=[LMCz]\b|<)|(?<=>)\s+| (?=z)", "", inner)
    inner = re.sub(r"\.(\d)\d{3,}", r".\1", inner)  # a tenth of a pixel is enough
    inner = re.sub(r"#fe00([0-9a-f]{2})", lambda found: f"var(--c{int(found[1], 16)})", inner)
    for stand_in, variable in ((INK, "--ink"), (SOFT, "--soft"), (GRID, "--line")):
        inner = inner.replace(stand_in, f"var({variable})")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
        f'{inner}<g aria-hidden="true">{over}</g></svg>'
    )


def _figure(title: str, unit: str, keys: Sequence[tuple[str, int, str]], svg: str) -> Markup:
    legend = "".join(
        f'<span class="key" style="--key: var(--c{colour % NUM_COLOURS})">{escape(name)} {escape(value)}</span>'
        for name, colour, value in keys
    )
    small = f" <small>{escape(unit)}</small>" if unit else ""
    caption = f"<figcaption>{escape(title)}{small}</figcaption>"
    return Markup(f'<figure class="card">{caption}{svg}<div class="keys">{legend}</div></figure>')
