"""The page about a run, for people who would rather look than read."""

from __future__ import annotations

import html
import json
from typing import Any

from pretrain.telemetry.report.charts import Line, line_chart
from pretrain.telemetry.report.style import document


def page(records: list[dict[str, Any]]) -> str:
    """The whole page as HTML text."""
    started = next((r for r in records if r["event"] == "run_started"), {})
    finished = next((r for r in reversed(records) if r["event"] == "run_finished"), None)
    train = [r for r in records if r["event"] == "train"]
    domains: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["event"] == "evaluation":
            domains.setdefault(record["domain"], []).append(record)
    title = html.escape(str(started.get("name", "run")))
    status = finished["status"] if finished else "running"
    step = records[-1]["step"] if records else 0
    facts = json.dumps(
        {k: v for k, v in started.items() if k not in ("event", "step", "time")}, indent=2, ensure_ascii=False
    )
    return document(
        started.get("name", "run"),
        f"""<h1>{title}</h1>
<p class="soft">{status} · step {step} of {started.get("total_steps", "?")} · {_speed(train)}</p>
<p class="verdict">{html.escape(verdict(domains))}</p>
{_table(domains)}
<div class="grid two">{_charts(train, domains)}</div>
<h2>What ran</h2><pre>{html.escape(facts)}</pre>""",
    )


def verdict(domains: dict[str, list[dict[str, Any]]]) -> str:
    """One sentence: what the new domain gained and what the base domains paid."""
    parts = []
    for name, scores in domains.items():
        delta = scores[-1]["delta_loss"]
        if delta is None or scores[-1]["loss"] is None:
            continue
        role, verb = ("new", "learned") if scores[-1]["role"] == "new" else ("base", "forgot")
        if (delta > 0) == (role == "new"):
            verb = "lost on" if role == "new" else "improved on"
        parts.append(f"{verb} {name} ({abs(delta):.3f} nats per token)")
    return f"The model {' and '.join(parts)}." if parts else "Nothing was scored yet."


def _speed(train: list[dict[str, Any]]) -> str:
    rates = sorted(r["tokens_per_second"] for r in train if r["tokens_per_second"])
    return (
        f"{rates[len(rates) // 2]:,.0f} tokens/s (median), {train[-1]['tokens']:,} tokens" if rates else "no step yet"
    )


def _table(domains: dict[str, list[dict[str, Any]]]) -> str:
    def number(value: float | None) -> str:
        return "—" if value is None else f"{value:,.2f}"

    rows = "".join(
        f"<tr><td>{html.escape(name)} ({scores[-1]['role']})</td><td>{number(scores[0]['perplexity'])}</td>"
        f"<td>{number(scores[-1]['perplexity'])}</td><td>{number(scores[-1]['bits_per_byte'])}</td>"
        f"<td>{number(scores[-1]['delta_loss'])}</td></tr>"
        for name, scores in domains.items()
    )
    head = (
        "<tr><th>domain</th><th>perplexity before</th><th>after</th><th>bits per byte</th><th>change (nats)</th></tr>"
    )
    return f"<table>{head}{rows}</table>"


def _charts(train: list[dict[str, Any]], domains: dict[str, list[dict[str, Any]]]) -> str:
    steps = [r["step"] for r in train]
    change = [
        Line(name, [s["step"] for s in scores], [s["delta_loss"] for s in scores], i)
        for i, (name, scores) in enumerate(domains.items())
    ]
    loss = line_chart("Training loss", [Line("loss", steps, [r["loss"] for r in train])], unit="nats per token")
    forgetting = line_chart("Change since step 0", change, unit="nats per token", zero=True)
    rate = line_chart("Learning rate", [Line("lr", steps, [r["lr"] for r in train])])
    speed = line_chart("Speed", [Line("tokens/s", steps, [r["tokens_per_second"] for r in train])])
    return loss + forgetting + rate + speed
