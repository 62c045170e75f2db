"""What ``task=advise`` has predicted for a run, compared with what the run has measured."""

from __future__ import annotations

from typing import Any

from pretrain.telemetry.history import History
from pretrain.telemetry.numbers import is_number, signed
from pretrain.telemetry.report.style import Markup, card, coloured, escape, table

HEAD = ("domain", "predicted change of the loss", "interval (80 %)", "after steps", "measured", "")


def predicted_table(config: dict[str, Any], history: History) -> Markup:
    """Return the table of predictions in nats per token; nothing for a run without any. A prediction for another length than the
    run's is shown without a verdict."""
    group = config.get("advise")
    predicted = group.get("predicted") if isinstance(group, dict) else None
    rows = []
    elsewhere = False
    for name, entry in predicted.items() if isinstance(predicted, dict) else ():
        if not _is_entry(entry):
            continue
        steps, change, low, high = entry[1:]
        domain = history.domains.get(name)
        measured = domain.change() if domain is not None and not domain.before_only else None
        same = history.step == steps
        elsewhere |= not same
        inside = is_number(measured) and low <= measured <= high
        verdict = coloured("inside", "good") if inside else coloured("outside", "warn")
        shown = verdict if same and is_number(measured) else ""
        rows.append((name, signed(change), f"{signed(low)} to {signed(high)}", f"{steps:,}", signed(measured), shown))
    if not rows:
        return Markup("")
    note = "A prediction for another number of steps than this run's is not compared with it." if elsewhere else ""
    return card(table(HEAD, rows), Markup(f'<p class="soft">{escape(note)}</p>') if note else "")


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 5 and isinstance(entry[1], int) and all(map(is_number, entry[1:]))
