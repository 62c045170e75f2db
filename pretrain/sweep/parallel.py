"""Parallel coordinates: one line per job through its position on every axis. The better the job, the stronger its line.

The chart is written directly as SVG, because it has only straight lines and labels, in the page's own colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.telemetry.numbers import compact
from pretrain.telemetry.report.style import Markup, escape, short

WIDTH, HEIGHT = 960, 290  # px; a narrow page scrolls the chart horizontally
TOP, BOTTOM, SIDE = 46, 42, 80  # px around the axes, for names and values
DECADE = 10.0  # positive numbers whose maximum / minimum is at least this are drawn on a logarithmic axis
MAX_LABELS = 12  # an axis with more values has labels at its ends only
CSS = """<style>.parallel path { fill: none; stroke-linejoin: round; } .parallel g:hover path { stroke: var(--c1);
stroke-width: 4; } .parallel g text { opacity: 0; font-weight: 600; } .parallel g:hover text { opacity: 1; fill: var(--ink); }
</style>"""


@dataclass(frozen=True)
class Axis:
    """An axis. ``places`` has the position of each job, 0 (bottom) … 1; ``ticks`` has (position, label)."""

    name: str
    places: Sequence[float]
    ticks: Sequence[tuple[float, str]]

    @classmethod
    def of_numbers(cls, name: str, values: Sequence[float], *, words: Sequence[str] | None = None) -> Axis:
        """Return a numeric axis. With ``words`` each value has that label; without, only the ends are labelled."""
        low, high = min(values), max(values)
        logarithmic = low > 0 and high / low >= DECADE
        scale = math.log if logarithmic else float
        span = (scale(high) - scale(low)) or 1.0
        places = [(scale(v) - scale(low)) / span if high > low else 0.5 for v in values]
        if words is None:
            return cls(
                name, places, [(0.0, compact(low)), (1.0, compact(high))] if high > low else [(0.5, compact(low))]
            )
        return cls(name, places, _spaced(dict(zip(places, words, strict=True))))

    @classmethod
    def of_words(cls, name: str, values: Sequence[str | None]) -> Axis:
        """Return an axis of strings: if all are numbers, a numeric axis, else in order of first occurrence."""
        words = ["default" if value is None else value for value in values]
        try:
            return cls.of_numbers(name, [float(word) for word in words], words=words)
        except ValueError:
            known = list(dict.fromkeys(words))
            at = {word: i / (len(known) - 1) if len(known) > 1 else 0.5 for i, word in enumerate(known)}
            return cls(name, [at[word] for word in words], _spaced({place: word for word, place in at.items()}))


def parallel_chart(axes: Sequence[Axis], names: Sequence[str]) -> Markup:
    """Return the chart. ``names`` are the names of the jobs, the best first, in the order of every axis's ``places``. The
    result is empty for fewer than two axes."""
    if len(axes) < 2:
        return Markup("")
    step = (WIDTH - 2 * SIDE) / (len(axes) - 1)
    x = [SIDE + i * step for i in range(len(axes))]
    placed = list(zip(axes, x, strict=True))
    frame = "".join(_axis(axis, at) for axis, at in placed)
    words = "".join(_ticks(axis, at, last=at == x[-1]) for axis, at in placed)  # drawn on top of the lines
    lines = [_job(name, rank, len(names), axes, x) for rank, name in enumerate(names)]
    description = f"Parallel coordinates of {len(names)} jobs; best: {names[0]}"
    return Markup(
        f'{CSS}<figure class="card parallel"><figcaption>Every job: its keys and its results '
        f"<small>the best job is blue; point at a line for its name</small></figcaption>"
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {HEIGHT}" style="min-width:40rem" role="img" '
        f'aria-label="{escape(description)}">{frame}{"".join(lines[::-1])}{words}</svg></div></figure>'
    )


def _job(name: str, rank: int, jobs: int, axes: Sequence[Axis], x: Sequence[float]) -> str:
    points = " ".join(f"{at:.1f} {_y(axis.places[rank]):.1f}" for axis, at in zip(axes, x, strict=True))
    share = 100 if rank == 0 else round(70 * (1 - rank / jobs))
    colour = f"color-mix(in oklab, var(--c0) {share}%, var(--line))"
    wide = 'stroke="transparent" stroke-width="12"'  # easier to point at
    return (
        f'<g><path d="M{points}" style="stroke:{colour};stroke-width:{3 if rank == 0 else 1.6}"/>'
        f'<path d="M{points}" {wide} style="stroke-opacity:0"/>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle" font-size="12">{escape(name)}</text></g>'
    )


def _axis(axis: Axis, x: float) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(1)}" y2="{_y(0)}" stroke="var(--soft)" stroke-width="1"/>'
    head = f'<text x="{x:.1f}" y="16" text-anchor="middle" font-size="12" font-weight="600">{escape(axis.name)}</text>'
    return line + head


def _ticks(axis: Axis, x: float, *, last: bool) -> str:
    """Return the labels of an axis. Labels at its ends are centred; labels in between are at its side."""
    halo = "paint-order:stroke;stroke:var(--card);stroke-width:5px;stroke-linejoin:round;pointer-events:none"
    labels = []
    for place, text in axis.ticks:
        side, down = ("middle", 0), 15 if place == 0 else -7 if place == 1 else 4
        if 0 < place < 1:
            side = ("start", 8) if last else ("end", -8)
        at = f'x="{x + side[1]:.1f}" y="{_y(place) + down:.1f}" text-anchor="{side[0]}"'
        labels.append(f'<text {at} font-size="11" style="{halo}">{escape(short(text, 22))}</text>')
    return "".join(labels)


def _y(place: float) -> float:
    return round(HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM), 1)


def _spaced(words: dict[float, str]) -> list[tuple[float, str]]:
    """Return ticks that do not overlap: all of them, or only the ends if there are too many."""
    places = sorted(words)
    if len(places) > MAX_LABELS:
        places = [places[0], places[-1]]
    return [(place, words[place]) for place in places]
