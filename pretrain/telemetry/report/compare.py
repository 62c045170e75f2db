"""The page that compares several runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.telemetry.numbers import amount, duration, instant, share, signed
from pretrain.telemetry.report import plots
from pretrain.telemetry.report.config_diff import differing
from pretrain.telemetry.report.folder import Run
from pretrain.telemetry.report.style import (
    KINDS,
    NUM_COLOURS,
    Markup,
    card,
    document,
    escape,
    grid,
    join,
    pill,
    section,
    table,
)
from pretrain.telemetry.report.summary import before_after, verdict


def compare_page(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Return the page as HTML text. ``names`` are the names of the runs, all different, as `names_of` returns them."""
    learned, went = plots.side_by_side(runs, names)
    title = f"{len(runs)} runs"
    body = join(
        [
            Markup(f"<header><h1>{title}</h1><p class='soft'>{escape(' · '.join(names))}</p></header>"),
            section("Results", _results(runs, names)),
            section("Learning and forgetting", grid([learned], "two")),
            section("Training and speed", grid([went])),
            section("Differences of the configurations", _differences(runs, names)),
            section("Summaries", _sentences(runs, names)),
            Markup(
                f'<footer class="soft"><p>Written {instant(time.time())}. Point at a chart for its numbers.</p></footer>'
            ),
        ]
    )
    return document(f"{title}: {', '.join(names)}", body)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return the shortest suffixes of ``paths`` that are all different: ``run``, or ``a/run`` and ``b/run``."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _results(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return the table of results, the run with the largest gain first."""
    rows = []
    for number in sorted(range(len(runs)), key=lambda i: _gain(runs[i])):
        run, history = runs[number], runs[number].history
        speed = (history.end or {}).get("tokens_per_second") or history.train.median("tokens_per_second")
        metrics = history.metrics()
        mfu = (history.end or {}).get("mfu") or history.last_train.get("mfu")
        rows.append(
            (
                _marked(names[number], number),
                Markup(pill(run.status, KINDS.get(run.status, ""))),
                f"{history.step:,}",
                signed(metrics["new_delta"]),
                signed(metrics["forgetting"]),
                join(f"{name} {before_after(d)}; " for name, d in history.domains.items())[:-2],
                amount(speed),
                share(mfu),
                duration(run.facts.get("seconds")),
            )
        )
    head = ("run", "", "step", "new: change", "base: change", "perplexity", "tokens/s", "MFU", "run time")
    return card(
        table(head, rows, text=(0, 1, 5)), Markup('<p class="soft">Changes in nats per token since step 0.</p>')
    )


def _gain(run: Run) -> float:
    change = run.history.metrics()["new_delta"]
    return float("inf") if change is None else float(change)


def _marked(name: str, number: int) -> Markup:
    """Return the name with a marker in the run's colour."""
    return Markup(f'<span class="key" style="--key: var(--c{number % NUM_COLOURS})">{escape(name)}</span>')


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return the table of the keys in which the configurations differ. Runs without a config.yaml are left out."""
    known = [(name, run) for name, run in zip(names, runs, strict=True) if run.config]
    if len(known) < 2:
        return Markup("")
    rows = [(key, *values) for key, values in differing([run.config for _, run in known])]
    if not rows:
        return card(Markup("<p>None: the configurations are equal except for name and output_dir.</p>"))
    return card(table(("key", *(name for name, _ in known)), rows, text=range(len(known) + 1)))


def _sentences(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    lines = (
        f"<p>{_marked(name, i)} {escape(verdict(run.history.domains, run.history.step))}</p>"
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    )
    return card(*map(Markup, lines))
