"""The tables and texts of what a run learned: scores by domain, the merge curve, metrics and samples."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.telemetry.history import Domain, History
from pretrain.telemetry.numbers import NOTHING, number, signed, significant
from pretrain.telemetry.report import plots
from pretrain.telemetry.report.style import Markup, card, coloured, escape, grid, join, table

MAX_ROWS = 40  # maximum rows of a table of unbounded length
MAX_SAMPLES = 12


def scores_table(history: History) -> Markup:
    if not history.domains:
        return Markup("")
    head = ("domain", "perplexity before", "after", "change (nats)", "loss (nats)", "bits per byte", "KL to base")
    rows = []
    for name, domain in history.domains.items():
        change = domain.change()
        kind = "" if change is None else "good" if change < 0 else "bad" if change > 0 else ""
        rows.append(
            (
                plots.domain_label(name, domain.role),
                number(domain.first.get("perplexity")),
                _scored_last(domain, history.step),
                coloured(_change(domain, history.step), kind),
                number(domain.last.get("loss"), 4),
                number(domain.last.get("bits_per_byte"), 4),
                number(domain.last.get("kl_to_base"), 4),
            )
        )
    return card(table(head, rows))


def merge_table(history: History) -> Markup:
    """Return the table of the points between the base model and the result, with the change of each domain."""
    if not history.merge:
        return Markup("")
    rows = []
    for place, scores in plots.merge_points(history):
        chosen = any(s.get("chosen") for s in scores.values())
        changes = (signed(scores[name].get("delta_loss")) if name in scores else NOTHING for name in history.domains)
        rows.append((plots.merge_label(*place) + (", exported" if chosen else ""), *changes))
    labels = (plots.domain_label(name, d.role) for name, d in history.domains.items())
    return card(table(("share of the result", *labels), rows))


def measurements_table(history: History) -> Markup:
    """Return the table of the metrics of evaluation tasks."""
    if not history.measured:
        return Markup("")
    rows = [
        (
            key,
            significant(m.first.get("value")) if m.first is not m.last else NOTHING,
            significant(m.last.get("value")),
            significant(m.last.get("stderr")),
            str(m.last.get("unit") or ""),
            str(m.last.get("better") or ""),
        )
        for key, m in list(history.measured.items())[:MAX_ROWS]
    ]
    return card(table(("metric", "first", "last", "standard error", "unit", "better"), rows))


def _scored_last(domain: Domain, step: int) -> str:
    """Return the perplexity of the last evaluation, with its step if that is not the run's current ``step``."""
    scored_at = domain.last["step"]
    if scored_at == 0 < step:
        return NOTHING
    return number(domain.last.get("perplexity")) + ("" if scored_at == step else f" (step {scored_at:,})")


def _change(domain: Domain, step: int) -> str:
    """Return the change in nats per token, or the reason why it is unknown."""
    if domain.before_only and step:
        return "not scored since step 0"
    return str(domain.last.get("delta_reason") or signed(domain.change()))


def sample_cards(history: History) -> Iterator[Markup]:
    """Yield cards with a prompt and its continuations before the run and now."""
    known = [pair for pair in history.samples.values() if pair]
    cards = []
    for pair in known[:MAX_SAMPLES]:
        first, last = pair[0], pair[-1]
        texts = [(f"step {r['step']:,}", str(r.get("text", ""))) for r in ([first, last] if len(pair) > 1 else [first])]
        columns = (
            Markup(f'<div><p class="soft">{escape(when)}</p><pre class="wrote">{escape(text)}</pre></div>')
            for when, text in texts
        )
        prompt = f'<pre class="prompt">{escape(first.get("prompt", ""))}</pre>'
        about = plots.domain_label(str(first.get("domain")), str(first.get("role")))
        cards.append(card(Markup(f'<p class="soft">{escape(about)}</p>{prompt}'), grid(columns, "two")))
    if cards:
        yield Markup(f'<div class="stack">{join(cards)}</div>')
    if len(known) > MAX_SAMPLES:
        yield Markup(f'<p class="soft">{len(known) - MAX_SAMPLES} more are in metrics.jsonl.</p>')
