"""Whether the model that a run begins with knows anything of the text it is scored on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pretrain.runtime.console import notice
from pretrain.telemetry.events import Evaluated, Event

UNTRAINED = 0.1  # nats per token by which random weights, which know nothing either, are worse than a guess


class BaselineCheck:
    """A listener that says once where the untouched model scores worse than a guess among all tokens alike.

    ``uniform_loss``: nats per token of such a guess; ``None``: nothing is expected of the model, its weights are random."""

    def __init__(self, uniform_loss: float | None) -> None:
        self._uniform_loss = uniform_loss

    def __call__(self, event: Event) -> None:
        if isinstance(event, Evaluated) and event.step == 0:
            text = doubt({score.domain: score.loss for score in event.scores}, self._uniform_loss)
            if text:
                notice(f"WARNING: {text}")


def doubt(losses: Mapping[str, float | None], uniform_loss: float | None) -> str | None:
    """What to say of a model with these losses at step 0, by domain; ``None`` where all are better than a guess."""
    if uniform_loss is None:
        return None
    limit = uniform_loss + UNTRAINED
    worse = [f"{name} {loss:.2f}" for name, loss in losses.items() if loss is not None and loss > limit]
    if not worse:
        return None
    return (
        f"at step 0 the model is worse than a uniform guess over its vocabulary of {math.exp(uniform_loss):,.0f} tokens "
        f"({uniform_loss:.2f} nats per token): {', '.join(worse)}. Its tokenizer is likely another model's, or its weights are "
        "broken"
    )
