"""Whether a run has lost in-context learning while its perplexity on the base domains is still fine."""

from __future__ import annotations

from pretrain.telemetry.history import History
from pretrain.telemetry.numbers import is_number

MEASURABLE = 0.1  # nats per token: a base model with a smaller gain by context has no in-context learning to lose
FINE = 0.1  # nats per token: a base domain whose loss rose by less counts as kept
KEPT = 0.5  # share of the gain at step 0 below which in-context learning counts as lost


def lost_in_context(history: History) -> str | None:
    """Return one line if the gain by context fell below half of that of the base model although no base domain's loss rose by
    more than 0.1 nats; otherwise ``None``. Perplexity does not show this loss (arXiv:2506.00288)."""
    base = [domain for domain in history.domains.values() if domain.role == "base"]
    if not base or any((change := domain.change()) is None or change > FINE for domain in base):
        return None
    steps, gains = base[0].curve("in_context_gain")
    before, now = gains[0], gains[-1]
    if steps[0] or not is_number(before) or not is_number(now) or before < MEASURABLE or now >= KEPT * before:
        return None
    return (
        f"perplexity fine, in-context learning lost: the gain by context fell from {before:.2f} to {now:.2f} nats per token, "
        "and no base domain's loss rose by more than 0.1"
    )
