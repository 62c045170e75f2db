"""The probe of in-context learning."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from pretrain.data.batch import IGNORE
from pretrain.evaluation.in_context import ROWS, in_context_probe
from pretrain.telemetry.history import History
from pretrain.telemetry.in_context import lost_in_context
from tests.engines import CPU, engine_of


class Copier:
    """A model that gives a token probability 1 if it follows the same token earlier in the row, 1/8 otherwise."""

    world = SimpleNamespace(device=CPU)

    def evaluate(self, batch):
        nats = 0.0
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            for i, label in enumerate(labels):
                seen = any(pair == (ids[i], label) for pair in pairwise(ids[: i + 1]))
                nats += 0.0 if label == IGNORE or seen else torch.log(torch.tensor(8.0)).item()
        return torch.tensor(nats)


def probe(**more):
    options = {"vocabulary": 5000, "excluded": [0, 7], "start": 0, "sequence_length": 32, "batch_size": 3} | more
    return in_context_probe(**options)


def test_rows_repeat_a_span_without_special_tokens():
    both = []
    for batches, length in ((probe().first, 16), (probe().second, 32)):
        assert [len(batch.input_ids) for batch in batches] == [3, 3, 2]
        ids, labels = (torch.cat([getattr(b, key) for b in batches]) for key in ("input_ids", "labels"))
        assert ids.shape == labels.shape == (ROWS, length)
        assert (ids[:, 0] == 0).all()
        assert not torch.isin(ids[:, 1:], torch.tensor([0, 7])).any()
        assert (labels[:, :-16] == IGNORE).all()
        assert torch.equal(labels[:, -16:-1], ids[:, -15:])
        assert (labels != IGNORE).sum() == ROWS * 16 == sum(batch.num_targets for batch in batches)
        both.append((ids, labels[:, -16:]))
    (first, targets), (second, again) = both
    assert torch.equal(targets, again), "the same span twice"
    assert torch.equal(second[:, :16], first)
    assert torch.equal(second[:, 1:17], targets)


def test_gain_of_a_model_that_copies():
    """The first token of the second copy follows the last one of the first, so it is not seen before."""
    assert probe().gain(Copier()) == pytest.approx(torch.log(torch.tensor(8.0)).item() * 15 / 16)


def test_an_untrained_model_gains_nothing():
    engine = engine_of()
    engine.model.eval()
    assert abs(probe(vocabulary=97, sequence_length=16).gain(engine)) < 0.2


def test_too_short():
    assert probe(sequence_length=3) is None
    assert probe(vocabulary=2, excluded=[1]) is None


def history(*scores, role="base"):
    def record(step, loss, gain):
        return {"event": "evaluation", "step": step, "domain": "old", "role": role, "loss": loss, "delta_loss": loss - 3.0} | {
            "perplexity": 1.0, "bits_per_byte": 1.0, "in_context_gain": gain, "digest": "a"
        }  # fmt: skip

    return History(record(*score) for score in scores)


def test_the_flag():
    line = lost_in_context(history((0, 3.0, 2.0), (10, 3.05, 0.9)))
    assert line is not None
    assert "from 2.00 to 0.90" in line
    assert lost_in_context(history((0, 3.0, 2.0), (10, 3.05, 1.1))) is None, "kept"
    assert lost_in_context(history((0, 3.0, 2.0), (10, 3.2, 0.9))) is None, "the perplexity shows it"
    assert lost_in_context(history((0, 3.0, 0.05), (10, 3.0, 0.0))) is None, "there was none"
    assert lost_in_context(history((0, 3.0, None), (10, 3.0, 0.0))) is None, "not measured"
    assert lost_in_context(history((0, 3.0, 2.0), (10, 3.0, 0.1), role="new")) is None, "no base domain"
    assert lost_in_context(history((0, 3.0, 2.0))) is None, "only step 0"
