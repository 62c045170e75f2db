"""Summarise the result of a run in words."""

from __future__ import annotations

from typing import Any

from pretrain.telemetry.history import Domain
from pretrain.telemetry.numbers import number, signed

# Changes of the loss in nats per token; the perplexity changes by a factor of e to this power. A change of less than 0.5 %
# counts as none; the sizes end at changes of 5 %, 35 % and a factor of 2.7.
UNCHANGED = 0.005
SIZES = (0.05, 0.3, 1.0)
VERBS = {  # role of the domain, whether it became better → words for each size
    ("new", True): ("learned a little of", "learned some of", "learned", "learned a lot of"),
    ("new", False): ("lost a little on", "lost on", "lost on", "lost a lot on"),
    ("base", True): ("improved a little on", "improved on", "improved on", "improved a lot on"),
    ("base", False): ("forgot a little of", "forgot some of", "forgot much of", "forgot most of"),
}


def verdict(domains: dict[str, Domain], step: int = 0) -> str:
    """Return one or two sentences on the changes of the new and the base domains. ``step`` is the run's current step."""
    if domains and all(domain.once for domain in domains.values()):
        scores = [f"{number(domain.last.get('perplexity'))} on {name}" for name, domain in domains.items()]
        if step and all(domain.before_only for domain in domains.values()):
            return f"Before this run the model had a perplexity of {_listed(scores)}; it has not been scored since."
        return f"The model has a perplexity of {_listed(scores)}."
    changed = [
        f"{_verb(domain.role, delta)} {name} (perplexity {before_after(domain)}, {signed(delta, 3)} nats per token)"
        for name, domain in domains.items()
        if (delta := domain.change()) is not None
    ]
    unknown = [
        f"The change on {name} is not known: {domain.last['delta_reason']}."
        for name, domain in domains.items()
        if domain.last.get("delta_reason")
    ]
    if changed:
        return " ".join([f"The model {_listed(changed)}.", *unknown])
    return " ".join(unknown) or ("No change is known yet." if domains else "Nothing has been scored yet.")


def _verb(role: str, delta: float) -> str:
    """Return the verb for a change. ``delta`` is in nats per token; negative is better."""
    if abs(delta) < UNCHANGED:
        return "kept"
    words = VERBS["new" if role == "new" else "base", delta < 0]
    return words[sum(abs(delta) >= size for size in SIZES)]


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def before_after(domain: Domain, digits: int = 2) -> str:
    """Return the perplexity of the domain before the run and now, or the only one if the domain was scored once."""
    if domain.once or domain.before_only:
        return number(domain.last.get("perplexity"), digits)
    before, after = domain.first.get("perplexity"), domain.last.get("perplexity")
    return f"{number(before, digits)} → {number(after, digits)}"


def caveats(config: dict[str, Any]) -> list[str]:
    """Return what must be known of the scores of a run with this config."""
    if "vocabulary" in (config.get("transform") or {}):
        return [
            "The vocabulary was extended: compare bits per byte. Perplexity and loss count other tokens than the base model does."
        ]
    return []
