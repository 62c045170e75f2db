"""report.html: one self-contained page about the run, for people who would rather look than read. No network, no script."""

from __future__ import annotations

import html
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from pretrain.events import RunStarted
from pretrain.telemetry.jsonl import records_until

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #e6e8eb); --paper: light-dark(#fff, #16181c);
  --line: light-dark(#d8dce1, #3a3f46); --soft: light-dark(#5b6470, #9aa3ad); }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } .verdict { font-size: 1.15rem; } .soft { color: var(--soft); }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .8rem .3rem 0; text-align: right;
  border-bottom: 1px solid var(--line); } td:first-child, th:first-child { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; color: var(--ink); }
.charts svg { width: 100%; height: auto; fill: currentColor; } pre { overflow-x: auto; font-size: .85rem; }
"""


class Report:
    """Written at every evaluation and at the end, from the records of the run and of the runs it continues."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._path = Path("report.html")

    def open(self, run: Path, start: RunStarted) -> None:
        self._path = run / "report.html"
        earlier = run / "metrics.jsonl"
        if start.step and earlier.exists():
            self._records = records_until(earlier, start.step, owes_evaluation=start.owes_evaluation)
        else:  # without a file: after a rollback, its own
            self._records = [r for r in self._records if r["step"] <= start.step]

    def write(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if record["event"] == "run_finished" or (record["event"] == "evaluation" and record["step"]):
            partial = self._path.with_suffix(".partial")
            partial.write_text(page(self._records), encoding="utf-8")
            os.replace(partial, self._path)

    def close(self) -> None:
        pass


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
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style>
<h1>{title}</h1>
<p class="soft">{status} · step {step} of {started.get("total_steps", "?")} · {_speed(train)}</p>
<p class="verdict">{html.escape(verdict(domains))}</p>
{_table(domains)}
<div class="charts">{_charts(train, domains)}</div>
<h2>What ran</h2><pre>{html.escape(facts)}</pre>
</html>
"""


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
    loss = [("training loss", [r["step"] for r in train], [r["loss"] for r in train])]
    change = [(n, [s["step"] for s in scores], [s["delta_loss"] for s in scores]) for n, scores in domains.items()]
    rate = [("learning rate", [r["step"] for r in train], [r["lr"] for r in train])]
    speed = [("tokens/s", [r["step"] for r in train], [r["tokens_per_second"] for r in train])]
    plots = (
        ("Training loss (nats per token)", loss),
        ("Change since step 0 (nats per token)", change),
        ("Learning rate", rate),
        ("Tokens per second", speed),
    )
    return "".join(_chart(title, lines) for title, lines in plots if any(len(x) > 1 for _, x, _ in lines))


def _chart(title: str, lines: list[tuple[str, list[int], list[float | None]]]) -> str:
    """An inline SVG whose axes take the page's ink, so that it reads in light and dark."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for name, x, y in lines:
        axes.plot(x, [float("nan") if v is None else v for v in y], label=name, marker="." if len(x) < 30 else None)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    if len(lines) > 1:
        axes.axhline(0, linewidth=0.8, color="black")
        axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")
