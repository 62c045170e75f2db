"""advice.html: the recipe, what is expected of it, the fits with their points, and what each probe cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from pretrain.telemetry.numbers import duration, number, share, signed
from pretrain.telemetry.report.charts import Line, Point, line_chart, scatter_chart
from pretrain.telemetry.report.style import (
    Markup,
    card,
    copyable,
    document,
    escape,
    grid,
    join,
    section,
    table,
    tile,
)

NATS = "nats per token"


def advice_page(advice: dict[str, Any], *, title: str) -> str:
    """Return the page as HTML text. ``advice`` is the content of advice.json."""
    parts = [
        Markup(f"<h1>{escape(title)}</h1>"),
        Markup(f'<p class="verdict">{escape(advice["sentence"])}</p>'),
        copyable(advice["command"]),
        grid(_tiles(advice), "tiles"),
        section("Why", _sentences(advice["reasons"])),
        section("Warnings", _sentences((advice["look"] or {}).get("warnings", []), "warn")),
        section("Expected", _expected(advice)),
        section("Learning rate", grid(_rate_charts(advice), "two")),
        section("Replay share", grid(_share_charts(advice), "two"), _checks(advice)),
        section("Length", grid(_length_charts(advice), "two"), _sentences(_refusals(advice))),
        section("Several devices", _batch(advice)),
        section("Means against forgetting", _means(advice)),
        section("Model and text", _look(advice)),
        section("Probes and what they cost", _probes(advice)),
        section("Notes, and what was not tried", _sentences(advice["notes"])),
    ]
    return document(title, join(parts))


def _tiles(advice: dict[str, Any]) -> Iterator[Markup]:
    budget = advice["budget"]
    yield tile(share(budget["spent"], 1), f"of the planned compute spent; {share(budget['share'], 1)} allowed")
    yield tile(f"{len(advice['probes'])}", f"probes of at most {budget['allotment']['steps']:,} steps")
    for name, one in advice["predicted"].items():
        ends = f"{signed(one['low'], 3)} to {signed(one['high'], 3)}"
        yield tile(signed(one["change"], 3), f"{NATS} expected on {name}, {ends}")


def _sentences(texts: list[str], kind: str = "soft") -> Markup:
    return join(Markup(f'<p class="{kind}">{escape(text)}</p>') for text in texts)


def _expected(advice: dict[str, Any]) -> Markup:
    if not advice["predicted"]:
        return Markup("")
    rows = [
        (
            name,
            one["role"],
            signed(one["change"]),
            f"{signed(one['low'])} to {signed(one['high'])}",
            f"{one['steps']:,}",
            "law of the learning curve" if one["by"] == "law" else "probe",
        )
        for name, one in advice["predicted"].items()
    ]
    head = ("domain", "role", f"change of the loss ({NATS})", "interval (80 %)", "after steps", "from")
    note = Markup(
        f'<p class="soft">{escape("A prediction from a probe is for the probe’s own length, not for the planned one.")}</p>'
    )
    return card(
        table(head, rows, text=(0, 1, 5)), note if any(o["by"] == "probe" for o in advice["predicted"].values()) else ""
    )


def _rate_charts(advice: dict[str, Any]) -> Iterator[Markup]:
    runs = [run for run in advice["probes"] if run["kind"] == "lr" and run["gain"] is not None]
    if advice["rate"] is None or not runs:
        return
    chosen = advice["rate"]["lr"]
    near = min(runs, key=lambda run: abs(run["lr"] - chosen))
    if all(run["forgetting"] is not None for run in runs):
        points = [
            Point(f"lr {run['lr']:g}", run["gain"], run["forgetting"], 0 if run is near else 9, run is near)
            for run in runs
        ]
        line = [(run["gain"], run["forgetting"]) for run in sorted(runs, key=lambda run: run["lr"])]
        yield scatter_chart(
            "Forgetting against gain by learning rate",
            points,
            x_label=f"gain on the new text ({NATS})",
            unit=NATS,
            paths=[line],
            large=True,
        )
    lines = []
    for i, run in enumerate(sorted(runs, key=lambda run: run["lr"])):
        for name, curve in run["losses"].items():
            changes = [y - curve["losses"][0] for y in curve["losses"]]
            lines.append(
                Line(f"{name}, lr {run['lr']:g}", curve["steps"], changes, i, dashed=name != _first_new(advice))
            )
    yield line_chart("Probes: change of the loss", lines, unit=NATS, zero=True, large=True)


def _first_new(advice: dict[str, Any]) -> str | None:
    return next((name for name, one in advice["predicted"].items() if one["role"] == "new"), None)


def _share_charts(advice: dict[str, Any]) -> Iterator[Markup]:
    found = advice["share"]
    if found is None:
        return
    points, laws = [], []
    for i, (name, losses) in enumerate(found["losses"].items()):
        base = found["base"][name]
        points.append(Line(f"{name}, scored", found["shares"], [y - base for y in losses], i))
        if name in found["curves"]:
            xs, ys, low, high = zip(*found["curves"][name], strict=True)
            bands = {"low": [y - base for y in low], "high": [y - base for y in high]}
            laws.append(Line(f"{name}, law", xs, [y - base for y in ys], i, dashed=True, **bands))
    yield line_chart(
        "Change of the loss by share of new text",
        [*points, *laws],
        unit=NATS,
        x_label="share of new text",
        zero=True,
        large=True,
    )
    new, base = ([name for name, role in found["roles"].items() if role == kind] for kind in ("new", "base"))
    if found["front"] and len(new) == len(base) == 1:
        a, b = new[0], base[0]
        front = [(x, ys[a] - found["base"][a], ys[b] - found["base"][b]) for x, ys in found["front"]]
        chosen = min(front, key=lambda row: abs(row[0] - (1 - found["replay"])))
        shown = [*front[:: max(1, len(front) // 8)], chosen]
        yield scatter_chart(
            "Front of the shares",
            [Point(f"{1 - x:.0%} old text", -n, o, 0 if x == chosen[0] else 9, x == chosen[0]) for x, n, o in shown],
            x_label=f"gain on {a} ({NATS})",
            unit=f"forgetting of {b}, {NATS}; LoRA probes",
            paths=[[(-n, o) for _, n, o in front]],
            large=True,
        )


def _checks(advice: dict[str, Any]) -> Markup:
    if not advice["checks"]:
        return Markup("")
    rows = [
        (c["role"], f"{c['from']:.0%} → {c['to']:.0%}", signed(c["predicted"]), signed(c["measured"]))
        for c in advice["checks"]
    ]
    head = ("role", "old text", f"difference of the loss by the law ({NATS})", "measured in true runs")
    return card(table(head, rows, text=(0, 1)))


def _length_charts(advice: dict[str, Any]) -> Iterator[Markup]:
    found = advice["length"]
    if found is None or not found["changes"]:
        return
    lines = []
    for i, (name, changes) in enumerate(found["changes"].items()):
        values, low, high = zip(*changes, strict=True)
        lines.append(Line(name, found["lengths"], values, i, low=low, high=high))
    yield line_chart(
        "Expected change of the loss by length of the run",
        lines,
        unit=f"{NATS}; the planned area of the rate is {found['extrapolation']:.1f} × the measured one",
        zero=True,
        large=True,
    )


def _refusals(advice: dict[str, Any]) -> list[str]:
    found = advice["length"]
    if found is None:
        return []
    return [f"{name}: the law of the learning curve was not used: {why}." for name, why in found["refused"].items()]


def _batch(advice: dict[str, Any]) -> Markup:
    found = advice["batch"]
    if not found:
        return Markup("")
    rows = [(f"{b:,}", number(loss, 4)) for b, loss in found["branches"]]
    return card(Markup(f"<p>{escape(found['sentence'])}</p>"), table(("tokens per step", "loss on the new text"), rows))


def _means(advice: dict[str, Any]) -> Markup:
    if not advice["means"]:
        return Markup("")
    rows = [
        (m["name"], number(m["gain"], 4), number(m["forgetting"], 4), "chosen" if m["chosen"] else "")
        for m in advice["means"]
    ]
    return card(table(("means", f"gain ({NATS})", f"forgetting ({NATS})", ""), rows, text=(0, 3)))


def _look(advice: dict[str, Any]) -> Markup:
    look = advice["look"]
    if look is None:
        return Markup("")
    rows = [
        (
            name,
            d["role"],
            number(d["loss"], 3),
            number(look["uniform_loss"], 2),
            number(d["bits_per_byte"], 3),
            number(d["tokens_per_word"], 2),
            number(d["tokens_per_byte"], 3),
        )
        for name, d in look["domains"].items()
    ]
    head = ("domain", "role", "loss", "uniform guess", "bits per byte", "tokens per word", "tokens per byte")
    text = f"The planned run reads {look['new_tokens']:,} tokens of new text {number(look['epochs'], 2)} times."
    return card(table(head, rows, text=(0, 1)), Markup(f'<p class="soft">{escape(text)}</p>'))


def _probes(advice: dict[str, Any]) -> Markup:
    rows = []
    for run in advice["probes"]:
        name = escape(run["name"])
        if run["link"]:
            name = Markup(f'<a href="{escape(quote(run["link"]))}">{name}</a>')
        gain, forgetting = number(run["gain"], 4), number(run["forgetting"], 4)
        rows.append(
            (name, run["kind"], f"{run['steps']:,}", gain, forgetting, share(run["cost"], 1), duration(run["seconds"]))
        )
    head = ("probe", "for", "steps", f"gain ({NATS})", f"forgetting ({NATS})", "of the planned compute", "time")
    return card(table(head, rows, text=(0, 1)))
