"""A model that is worse than a guess at step 0 is not of this tokenizer, and the run says so."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pretrain.telemetry import baseline
from pretrain.telemetry.baseline import BaselineCheck, doubt
from pretrain.telemetry.events import DomainScore, Evaluated

UNIFORM = math.log(4096)


def evaluated(loss: float, step: int = 0) -> Evaluated:
    score = DomainScore("english", "base", loss, math.exp(loss), None, 100)
    return Evaluated(step, (score,), 0.0)


@pytest.mark.parametrize(
    ("event", "uniform", "warns"),
    [
        (evaluated(9.7552), UNIFORM, True),  # perplexity 17,244
        (evaluated(UNIFORM + 0.11), UNIFORM, True),
        (evaluated(UNIFORM + 0.05), UNIFORM, False),  # as random weights are
        (evaluated(4.0), UNIFORM, False),
        (evaluated(9.7552, step=100), UNIFORM, False),
        (evaluated(9.7552), None, False),  # model=scratch
    ],
)
def test_only_an_untouched_model_is_judged(event, uniform, warns, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(baseline, "notice", said.append)
    BaselineCheck(uniform)(event)
    assert bool(said) == warns


def test_the_words() -> None:
    text = doubt({"english": 9.7552, "new": 3.0, "code": None}, UNIFORM)
    assert text is not None
    assert "vocabulary of 4,096 tokens (8.32 nats per token): english 9.76. Its tokenizer" in text
