"""The report page of one run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from pretrain.config.defaults import defaults_for
from pretrain.telemetry.baseline import doubt
from pretrain.telemetry.history import History
from pretrain.telemetry.in_context import lost_in_context
from pretrain.telemetry.numbers import (
    amount,
    duration,
    instant,
    is_number,
    number,
    share,
    size,
)
from pretrain.telemetry.record import Record
from pretrain.telemetry.report import plots
from pretrain.telemetry.report.config_diff import as_yaml, differing, flat
from pretrain.telemetry.report.folder import Run
from pretrain.telemetry.report.positions import position_charts, unfilled
from pretrain.telemetry.report.predicted import predicted_table
from pretrain.telemetry.report.results import MAX_ROWS, measurements_table, merge_table, sample_cards, scores_table
from pretrain.telemetry.report.style import (
    KINDS,
    Markup,
    bar,
    card,
    coloured,
    copyable,
    details,
    document,
    escape,
    facts,
    grid,
    join,
    pill,
    section,
    table,
    tile,
)
from pretrain.telemetry.report.summary import before_after, caveats, verdict


def run_page(run: Run) -> str:
    """Return the page as HTML text."""
    history = run.history
    domains = history.domains
    body = join(
        [
            _head(run),
            Markup(f'<p class="verdict">{escape(verdict(domains, history.step))}</p>'),
            _doubt(history),
            _lost(history),
            grid(_tiles(run), "tiles"),
            section(
                "Learning and forgetting",
                grid([plots.loss_chart(history), plots.change_chart(history)], "two"),
                scores_table(history),
                Markup("".join(f'<p class="soft">{escape(text)}</p>' for text in caveats(run.config))),
                grid([plots.drift_charts(history)], "two"),
                grid([position_charts(history)], "two"),
                Markup("".join(f'<p class="soft">{escape(text)}</p>' for text in unfilled(history))),
            ),
            section("Predicted by task=advise, and measured", predicted_table(run.config, history)),
            section("Base model and result merged", grid([plots.merge_chart(history)], "two"), merge_table(history)),
            section("Metrics of evaluation tasks", grid([plots.metric_charts(history)]), measurements_table(history)),
            section("Samples", *sample_cards(history)),
            section(
                "Training and speed",
                _time_bar(history),
                grid([plots.training_charts(history), plots.speed_charts(history)]),
            ),
            section("Data seen", _parts(history), _sources(history)),
            section("Norms by layer", grid([plots.layer_charts(history)]), _layers(history)),
            section("Faults and resumes", _events(run)),
            section("Checkpoints", _checkpoints(history)),
            section("Configuration", *_configuration(run)),
            section("Environment", _environment(history.start)),
            _foot(history),
        ]
    )
    return document(run.name, body)


def _parameters(start: Record) -> str:
    """Return the number of parameters, and of those that are trained if they are fewer."""
    total, trained = start.get("parameters"), start.get("trained_parameters")
    return f"{amount(total)} parameters" + (f", {amount(trained)} trained" if trained not in (None, total) else "")


def _head(run: Run) -> Markup:
    start, history = run.history.start, run.history
    total = start.get("total_steps")
    processes = start.get("world_size")
    parts = [
        f"{start['model']} ({_parameters(start)})" if "model" in start else None,
        start.get("strategy") if processes in (None, 1) else f"{start.get('strategy')} × {processes}",
        start.get("precision"),
        start.get("device"),
        f"step {history.step:,} of {total:,}" if is_number(total) else f"step {history.step:,}",
        f"{history.last_train['tokens']:,} tokens" if is_number(history.last_train.get("tokens")) else None,
        instant(history.first.get("time")),
    ]
    line = " · ".join(str(part) for part in parts if part)
    return Markup(
        f"<header><h1>{escape(run.name)}{pill(run.status, KINDS.get(run.status, ''))}</h1>"
        f'<p class="soft">{escape(line)}</p></header>'
    )


def _doubt(history: History) -> Markup:
    """Return a warning if the base model scored worse than a uniform guess at step 0."""
    first = {name: d.first.get("loss") for name, d in history.domains.items() if d.first.get("step") == 0}
    uniform = history.start.get("uniform_loss")
    text = doubt({n: x for n, x in first.items() if is_number(x)}, uniform if is_number(uniform) else None)
    return Markup(f'<p class="verdict bad">{escape(text)}</p>') if text else Markup("")


def _tiles(run: Run) -> Iterator[Markup]:
    """Yield tiles with the most important numbers, as far as they are known."""
    history, last = run.history, run.history.last_train
    for name, domain in list(history.domains.items())[:4]:
        before = " before this run" if domain.before_only and history.step else ""
        yield tile(before_after(domain, digits=1), f"perplexity of {plots.domain_label(name, domain.role)}{before}")
    speed = (history.end or {}).get("tokens_per_second") or history.train.median("tokens_per_second")
    if speed:
        yield tile(amount(speed), "tokens per second")
    end = history.end or {}
    if is_number(mfu := end.get("mfu") or last.get("mfu")):
        yield tile(share(mfu), "MFU")
    if is_number(goodput := end.get("goodput") or last.get("goodput")):
        yield tile(share(goodput), "goodput: share of the time spent training")
    if is_number(memory := last.get("memory_gib")):
        planned, room = history.start.get("planned_memory_gib"), history.start.get("device_memory_gib")
        against = f", {planned:.2f} GiB planned" if is_number(planned) and is_number(room) else ""
        yield tile(f"{memory:.2f} GiB", f"peak memory{against}")
    if is_number(seconds := run.facts.get("seconds")):
        yield tile(duration(seconds), "run time, all starts")
    if run.status == "running" and is_number(eta := last.get("eta_seconds")):
        yield tile(duration(eta), "remaining")


def _lost(history: History) -> Markup:
    """Return the warning that in-context learning is lost, if it is."""
    line = lost_in_context(history)
    return Markup(f'<p class="verdict bad">{escape(line)}</p>') if line else Markup("")


def _time_bar(history: History) -> Markup:
    """Return a bar of the run's time by part."""
    total = sum(history.seconds.values())
    if total <= 0:
        return Markup("")
    parts = [
        (plots.part_label(history, name), colour, spent, f"{duration(spent)}, {share(spent / total)}")
        for colour, (name, spent) in enumerate(history.seconds.items())
        if spent > 0
    ]
    return card(bar("Time by part, from the first step to the last record", parts))


def _parts(history: History) -> Markup:
    """Return the table of the parts of a mixture, and of its phases; nothing for a single part."""
    counts: dict[str, Any] = history.data.get("parts") or {}
    if len(counts) < 2:
        return Markup("")
    rows = [
        (name, amount(p.get("tokens")), share(p.get("share"), 1), share(p.get("wanted"), 1), number(p.get("epochs"), 2))
        for name, p in list(counts.items())[:MAX_ROWS]
    ]
    listed = table(("part", "tokens", "share", "share by the weights", "epochs"), rows)
    phases = [(f"{step:,}", plots.shares_text(shares)) for step, shares in plots.phases_of(history)]
    return card(listed, table(("from step", "shares"), phases, text=(1,)) if len(phases) > 1 else "")


def _sources(history: History) -> Markup:
    sources: dict[str, Any] = history.data.get("sources") or {}
    if not sources:
        return Markup("")
    ranked = sorted(sources.items(), key=lambda item: -(item[1].get("tokens") or 0))
    rows = [
        (name, amount(s.get("documents")), amount(s.get("tokens")), share(s.get("share"), 1))
        for name, s in ranked[:MAX_ROWS]
    ]
    parts = [(name, i, s.get("tokens") or 0, share(s.get("share"))) for i, (name, s) in enumerate(ranked[:8])]
    more = f"{len(ranked) - MAX_ROWS} more sources; " if len(ranked) > MAX_ROWS else ""
    mean = f"{more}{number(history.data.get('tokens_per_document'), 0)} tokens per document"
    shares = bar("Tokens by source", parts) if len(parts) > 1 else Markup("")
    listed = table(("source", "documents", "tokens", "share"), rows)
    if len(rows) > len(parts):
        listed = details(f"All {len(ranked)} sources", listed)
    return card(shares, listed, Markup(f'<p class="soft">{escape(mean)}</p>'))


def _layers(history: History) -> Markup:
    if not history.layers:
        return Markup("")
    keys = ("weight_norm", "grad_norm", "update_norm", "update_ratio")
    rows = [(name, *(amount(c.mean(k)[-1]) for k in keys)) for name, c in history.layers.items() if c.steps]
    head = ("layer", "weight norm", "gradient norm", "update norm", "update / weight")
    return card(details(f"Last values of {len(rows)} layers", table(head, rows)))


def _events(run: Run) -> Markup:
    """Return the table of starts, resumes, stops, rollbacks and quarantined batches, sorted by time."""
    found = [(r.get("time"), r["step"], *_event_text(r)) for r in run.history.run_events]
    found += [(r.get("time"), r.get("step", 0), *_quarantined(r)) for r in run.quarantine]
    found.sort(key=lambda row: row[0] if is_number(row[0]) else 0.0)
    restarts = run.facts.get("restarts")
    resumed = sum(r["event"] == "run_started" and bool(r.get("resumed")) for r in run.history.run_events)
    rollbacks = sum(r["event"] == "rollback" for r in run.history.run_events)
    counts = [(resumed, "resume"), (rollbacks, "rollback"), (len(run.quarantine), "quarantined batch")]
    if is_number(restarts) and restarts > resumed:
        counts.append((int(restarts) - resumed, "restart from the beginning"))
    counted = ", ".join(
        f"{n} {what}{'' if n == 1 else 'es' if what.endswith('ch') else 's'}" for n, what in counts if n
    )
    rows = [(instant(when), f"{step:,}", coloured(what, kind)) for when, step, what, kind in found]
    shown = rows[-MAX_ROWS:]
    summary = counted or "None: one start, no rollback, nothing quarantined."
    left_out = f" The last {MAX_ROWS} of {len(rows)} events:" if len(rows) > len(shown) else ""
    return card(
        Markup(f"<p>{escape(summary + left_out)}</p>"),
        table(("time", "step", "what"), shown, text=(0, 2)) if rows else "",
    )


def _event_text(record: Record) -> tuple[str, str]:
    """Return a description of a start, a stop or a rollback, and its colour (see `coloured`)."""
    if record["event"] == "rollback":
        return f"rolled back from step {record.get('bad_step')}: {record.get('reason')}", "bad"
    if record["event"] == "run_finished":
        status = str(record.get("status"))
        if record.get("stopped_by"):
            return f"{status}, stop_when: {record['stopped_by']}", KINDS.get(status, "")
        return status, KINDS.get(status, "")
    where = f"on {record.get('world_size')} × {record.get('device')}" if record.get("device") else ""
    return (f"resumed {where}", "warn") if record.get("resumed") else (f"started {where}", "")


def _quarantined(record: Record) -> tuple[str, str]:
    documents = [f"{d.get('path')}#{d.get('index')}" for d in record.get("documents") or [] if isinstance(d, dict)]
    more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
    return f"quarantined ({record.get('reason')}): {', '.join(documents[:3])}{more}", "bad"


def _checkpoints(history: History) -> Markup:
    if not history.checkpoints:
        return Markup("")
    rows = [
        (
            "/".join(PurePath(str(r.get("path"))).parts[-2:]),
            f"{r['step']:,}",
            size(r.get("bytes")),
            duration(r.get("seconds")),
            duration(r.get("blocked_seconds")),
        )
        for r in reversed(history.checkpoints)
    ]
    head = ("folder", "step", "size", "time to write", "training blocked")
    more = history.num_checkpoints - len(rows)
    note = (
        f'<p class="soft">and {more} earlier ones; the configuration determines which old checkpoints are kept</p>'
        if more > 0
        else ""
    )
    return card(table(head, rows), Markup(note))


def _configuration(run: Run) -> Iterator[Markup]:
    if run.overrides:
        yield card(
            Markup("<p>Overrides from the command line or a file:</p>"),
            copyable("\n".join(o.removeprefix("++") for o in run.overrides)),
        )
    if not run.config:
        return
    changed = differing([defaults_for(run.config), run.config])
    rows = [
        (key, Markup(f"<del>{escape(before)}</del>"), Markup(f"<ins>{escape(now)}</ins>"))
        for key, (before, now) in changed
    ]
    if rows:
        yield card(table(("key", "default", "this run"), rows, text=(0, 1, 2)))
    else:
        yield card(Markup("<p>All keys have their default values.</p>"))
    every = table((), [(key, as_yaml(value)) for key, value in flat(run.config)], text=(0, 1))
    yield card(details("Complete configuration", every))


def _environment(start: Record) -> Markup:
    known = {
        k: v for k, v in start.items() if k not in ("event", "step", "time", "resumed", "mixture") and v is not None
    }
    rows = [(key.replace(".", " · ").replace("_", " "), as_yaml(value)) for key, value in flat(known)]
    return card(facts(rows)) if rows else Markup("")


def _foot(history: History) -> Markup:
    thinned = ""
    if history.train.width > 1:
        points = len(history.train.steps)
        thinned = (
            f" Curves show {points} points of {history.num_train:,} records: each is the mean of "
            f"{history.train.width} records, and the loss chart shows their minimum and maximum as a band; metrics.jsonl has "
            "all records."
        )
    return Markup(
        f'<footer class="soft"><p>Written {instant(time.time())}, last record {instant(history.last.get("time"))}. '
        f"Point at a chart for its numbers.{thinned}</p></footer>"
    )
