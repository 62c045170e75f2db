"""sweep.html: one page about the jobs of a sweep: the best job, the effect of each key, and gain against forgetting."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pretrain.sweep.measure import ranking, records_of
from pretrain.sweep.parallel import Axis, parallel_chart
from pretrain.telemetry.history import mean
from pretrain.telemetry.numbers import amount, compact, duration, number, signed
from pretrain.telemetry.report import style
from pretrain.telemetry.report.charts import Line, Point, line_chart, scatter_chart
from pretrain.telemetry.report.style import KINDS, NUM_COLOURS, Markup, escape, join

Row = dict[str, Any]
HEAD = ("", "job", "status", "new-domain loss", "change", "forgetting", "tokens/s", "time")
LONGEST_VALUE = 24  # characters
LABELS = {"new_loss": "new-domain loss", "new_delta": "change of the new-domain loss", "train_loss": "training loss"}
LABELS |= {"forgetting": "forgetting", "tokens_per_second": "tokens/s"}


def page(folder: Path, table: Row) -> str:
    """Return the page as HTML text. ``table`` is the content of sweep.json."""
    rows: list[Row] = table["jobs"]
    ranked = ranking(rows, table["metric"]["direction"])
    title = folder.absolute().name
    status = table["status"]
    parts = [
        Markup(f"<h1>{escape(title)}{style.pill(status, KINDS.get(status, ''))}</h1>"),
        Markup(f'<p class="soft">{escape(_status_counts(rows))}</p>'),
        Markup(f'<p class="verdict">{escape(verdict(table, ranked))}</p>'),
        _tiles(rows, ranked, table),
        style.section("Effect of each key", parallel_chart(_axes(ranked, table), _lines(ranked))),
        style.section("Gain and forgetting", style.grid([_front(rows, table), *_curves(folder, ranked)])),
        style.section("Jobs", style.card(_jobs(folder, rows, ranked, table))),
        style.section("Command of the best run", style.copyable(ranked[0]["command"])) if ranked else "",
        style.section("Command that repeats or resumes this sweep", style.copyable(table["command"])),
    ]
    return style.document(f"{title} · sweep", join(parts))


def verdict(table: Row, ranked: list[Row]) -> str:
    """Return one sentence on the best job, its gain and its forgetting."""
    if not ranked:
        failed = sum(row["status"] == "failed" for row in table["jobs"])
        return f"No job has finished yet{f'; {failed} failed' if failed else ''}."
    best, metric = ranked[0], table["metric"]
    text = f"Best of {len(ranked)}: {best['name']}, {_metric_label(metric)} {_number(best['objective'])}"
    if best["new_delta"] is not None:
        verb = "gained" if best["new_delta"] <= 0 else "lost"
        text += f"; it {verb} {abs(best['new_delta']):.3f} nats per token on the new domain"
    if best["forgetting"] is not None:
        verb = "forgot" if best["forgetting"] > 0 else "gained"
        text += f" and {verb} {abs(best['forgetting']):.3f} on the base domains"
    return text + "."


def varying(rows: list[Row]) -> dict[str, list[str | None]]:
    """Return the keys whose values differ between jobs, each with its value in every job; ``None`` if a job lacks the key."""
    overrides = [dict(o.lstrip("+~").split("=", 1) for o in row["overrides"] if "=" in o) for row in rows]
    keys = dict.fromkeys(key for words in overrides for key in words)
    values = {key: [words.get(key) for words in overrides] for key in keys}
    return {key: column for key, column in values.items() if len(set(column)) > 1}


def short_names(rows: list[Row]) -> dict[int, str]:
    """Return a short name for each job number: the values of the keys that vary, such as ``0.001 · ddp``."""
    values = [[str(value or "default")[:LONGEST_VALUE] for value in column] for column in varying(rows).values()]
    labels = [" · ".join(of_job) for of_job in zip(*values, strict=True)]
    return {row["number"]: name for row, name in zip(rows, labels or [row["name"] for row in rows], strict=True)}


def _status_counts(rows: list[Row]) -> str:
    counts = Counter(row["status"] for row in rows)
    return f"{len(rows)} jobs: " + ", ".join(f"{counts[status]} {status}" for status in KINDS if counts[status])


def _tiles(rows: list[Row], ranked: list[Row], table: Row) -> Markup:
    tiles = [style.tile(f"{sum(r['status'] == 'finished' for r in rows)} of {len(rows)}", "jobs finished")]
    objectives = [row["objective"] for row in ranked]
    if ranked:
        tiles.append(style.tile(_number(objectives[0]), f"best {_metric_label(table['metric'])}"))
    if len(ranked) > 1:
        tiles.append(style.tile(_number(abs(objectives[-1] - objectives[0])), "between the best and the worst"))
    speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"]]
    if speeds:
        tiles.append(style.tile(compact(max(speeds)), "tokens/s, the fastest job"))
    tiles.append(style.tile(duration(sum(row["seconds"] for row in rows)), "total time of the jobs"))
    return style.grid(tiles, "tiles")


def _axes(ranked: list[Row], table: Row) -> list[Axis]:
    """Return the axes of the parallel coordinates: first the keys that vary, then the results, the objective last."""
    if len(ranked) < 2:
        return []
    axes = [Axis.of_words(key, values) for key, values in varying(ranked).items()]
    metric = table["metric"]["name"]
    for name in ("tokens_per_second", "forgetting", "new_loss"):
        values = [row[name] for row in ranked]
        if name != metric and None not in values:
            axes.append(Axis.of_numbers(LABELS[name], values))
    return [*axes, Axis.of_numbers(_metric_label(table["metric"]), [row["objective"] for row in ranked])]


def _lines(ranked: list[Row]) -> list[str]:
    return [f"{row['name']}: {_number(row['objective'])}" for row in ranked]


def _front(rows: list[Row], table: Row) -> Markup:
    """Return the chart of every finished job by gain and forgetting; a line joins the jobs of the Pareto front."""
    known = [r for r in rows if r["status"] == "finished" and None not in (r["new_delta"], r["forgetting"])]
    by_number = {row["number"]: row for row in known}
    front = [by_number[number] for number in table["pareto"]]
    names = short_names(known)
    points = [
        Point(
            names[row["number"]],
            -row["new_delta"],
            row["forgetting"],
            colour=0 if row in front else 9,
            strong=row["number"] == table["best"] or row in (front[0], front[-1]),
        )
        for row in known
    ]
    line = sorted((-row["new_delta"], row["forgetting"]) for row in front)
    return scatter_chart(
        "Forgetting against gain",
        points,
        x_label="gain on the new domain (nats per token)",
        unit="nats per token; the line is the Pareto front",
        paths=[line] if len(line) > 1 else [],
    )


def _curves(folder: Path, ranked: list[Row]) -> list[Markup]:
    """Return the charts of the best jobs' change of the loss since step 0, on the new and on the base domains."""
    shown = ranked[:NUM_COLOURS]
    names = short_names(ranked)
    of_roles: dict[str, list[Line]] = {"new": [], "base": []}
    for colour, row in enumerate(shown):
        records = records_of(folder / row["folder"] / "metrics.jsonl", "evaluation")
        for role, lines in of_roles.items():
            steps = sorted({r["step"] for r in records if r["role"] == role})
            at = [mean(r["delta_loss"] for r in records if r["role"] == role and r["step"] == s) for s in steps]
            twin = (
                colour % 2 == 1
            )  # so that two lines that coincide are both visible: equal jobs are neighbours in rank
            lines.append(Line(names[row["number"]], steps, at, colour, dashed=twin))
    few = f", the best {len(shown)} jobs" if len(shown) < len(ranked) else ""
    titles = {"new": f"New domain: change of the loss{few}", "base": f"Base domains: change of the loss{few}"}
    unit = "nats per token since step 0"
    return [line_chart(titles[role], lines, unit=unit, zero=True) for role, lines in of_roles.items()]


def _jobs(folder: Path, rows: list[Row], ranked: list[Row], table: Row) -> Markup:
    """Return the ranked table of jobs. A job's name links to its report."""
    others = [row for row in rows if row not in ranked]
    metric = table["metric"]
    own = (
        ()
        if metric["name"] in ("new_loss", "new_delta", "forgetting", "tokens_per_second")
        else (_metric_label(metric),)
    )
    lines = []
    for place, row in enumerate([*ranked, *others], start=1):
        status: Any = Markup(
            f'<span style="white-space:nowrap">{style.pill(row["status"], KINDS[row["status"]])}</span>'
        )
        if row["error"]:
            status = Markup(f'{status}<div class="soft" style="min-width:14rem">{escape(row["error"])}</div>')
        lines.append(
            [
                place if row in ranked else "",
                _named(folder, row, table),
                status,
                *([_number(row["objective"])] if own else []),
                _number(row["new_loss"]),
                signed(row["new_delta"]),
                signed(row["forgetting"]),
                amount(row["tokens_per_second"]),
                duration(row["seconds"] or None),
            ]
        )
    return style.table([*HEAD[:3], *own, *HEAD[3:]], lines, text=(1, 2))


def _named(folder: Path, row: Row, table: Row) -> Markup:
    name = escape(row["name"])
    if (folder / row["folder"] / "report.html").exists():
        name = Markup(f'<a href="{escape(quote(row["folder"]))}/report.html">{name}</a>')
    best = style.pill("best", "good") if row["number"] == table["best"] else ""
    front = style.pill("front") if row["number"] in table["pareto"] else ""
    return Markup(f'<div style="min-width:13rem">{name}{best}{front}</div>')


def _metric_label(metric: Row) -> str:
    name: str = metric["name"]
    return LABELS.get(name, re.sub(r"_(?=[a-z])", " ", name))


def _number(value: float | None) -> str:
    return number(value, 4) if value is None or abs(value) < 1000 else compact(value)
