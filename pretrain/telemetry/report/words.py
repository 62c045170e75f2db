"""What a run has come to, in words, and numbers as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

from pretrain.telemetry.report.charts import compact
from pretrain.telemetry.report.history import Domain, is_number

NOTHING = "—"
UNCHANGED = 0.005  # nats per token; a change of less than half a percent in perplexity is none


def verdict(domains: dict[str, Domain]) -> str:
    """One sentence: what the new domain gained and what the base domains paid."""
    if domains and all(domain.once for domain in domains.values()):
        scores = [f"{number(domain.last.get('perplexity'))} on {name}" for name, domain in domains.items()]
        return f"The model has a perplexity of {_listed(scores)}."
    parts = []
    for name, domain in domains.items():
        delta = domain.change()
        if delta is None:
            continue
        new = domain.role == "new"
        better, worse = ("learned", "lost on") if new else ("improved on", "forgot some of")
        verb = "kept" if abs(delta) < UNCHANGED else better if delta < 0 else worse
        parts.append(f"{verb} {name} (perplexity {before_after(domain)}, {signed(delta, 3)} nats per token)")
    if not parts:
        return "No change is known yet." if domains else "Nothing has been scored yet."
    return f"The model {_listed(parts)}."


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def before_after(domain: Domain, digits: int = 2) -> str:
    """Its perplexity at the start of the run and now."""
    if domain.once:
        return number(domain.last.get("perplexity"), digits)
    before, after = domain.first.get("perplexity"), domain.last.get("perplexity")
    return f"{number(before, digits)} → {number(after, digits)}"


def number(value: object, digits: int = 2) -> str:
    return f"{value:,.{digits}f}".replace("-", "−") if is_number(value) else NOTHING


def signed(value: object, digits: int = 4) -> str:
    return f"{value:+,.{digits}f}".replace("-", "−") if is_number(value) else NOTHING


def amount(value: object) -> str:
    """A count or a rate, short: 12.3k."""
    return compact(value) if is_number(value) else NOTHING


def share(value: object, digits: int = 0) -> str:
    if not is_number(value):
        return NOTHING
    least = 10.0**-digits  # percent that can be told from none
    return f"{100 * value:.{digits}f} %" if value == 0 or 100 * value >= least / 2 else f"<{least:g} %"


def size(value: object) -> str:
    """Bytes."""
    if not is_number(value):
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def duration(seconds: object) -> str:
    """4 ms, 8.4 s, 12 min, 3 h 05 min, 2 d 4 h."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def instant(seconds: object) -> str:
    """Unix seconds as a date and a time of day."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if is_number(seconds) else NOTHING
