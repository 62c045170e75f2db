"""What a run has come to, in words."""

from __future__ import annotations

from pretrain.telemetry.numbers import number, signed
from pretrain.telemetry.report.history import Domain

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
