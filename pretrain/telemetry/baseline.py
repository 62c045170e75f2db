"""Check that the base model (before training) scores better than a uniform guess on the evaluation text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pretrain.runtime.console import notice
from pretrain.telemetry.events import Evaluated, Event

UNTRAINED = 0.1  # nats per token: randomly initialised weights score worse than a uniform guess by up to this much


class BaselineCheck:
    """A listener that warns once, at step 0, if the base model scores worse than a uniform guess over the vocabulary.

    ``uniform_loss`` is the loss of that guess in nats per token. ``None`` disables the check, for randomly initialised
    weights."""

    def __init__(self, uniform_loss: float | None) -> None:
        self._uniform_loss = uniform_loss

    def __call__(self, event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == 0:
            text = doubt({score.domain: score.loss for score in event.scores}, self._uniform_loss)
            if text:
                notice(f"WARNING: {text}")


def doubt(losses: Mapping[str, float | None], uniform_loss: float | None) -> str | None:
    """Return a warning if any of the step-0 ``losses`` (by domain) is worse than a uniform guess, else ``None``."""
    if uniform_loss is None:
        return None
    limit = uniform_loss + UNTRAINED
    worse = [f"{name} {loss:.2f}" for name, loss in losses.items() if loss is not None and loss > limit]
    if not worse:
        return None
    return (
        f"at step 0 the model is worse than a uniform guess over its vocabulary of {math.exp(uniform_loss):,.0f} tokens "
        f"({uniform_loss:.2f} nats per token): {', '.join(worse)}. Its tokenizer probably belongs to another model, "
        "or its weights are damaged"
    )
