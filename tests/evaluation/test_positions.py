"""The loss by position: against the logits of all tokens, and what the report shows of it."""

import math

import pytest
import torch
from torch.nn import functional as F

from pretrain.data.batch import IGNORE, Batch
from pretrain.evaluation.base_states import BaseStates
from pretrain.evaluation.perplexity import Domain, Evaluator
from pretrain.evaluation.positions import Buckets
from pretrain.telemetry.events import PositionLosses
from pretrain.telemetry.history import History
from pretrain.telemetry.report.folder import Run
from pretrain.telemetry.report.page import run_page
from tests.engines import IDS, engine_of
from tests.telemetry.report.records import evaluation, started

LABELS = IDS[:, 1:].clone()
LABELS[0, :5] = IGNORE
STARTS = torch.cat([torch.arange(6), torch.arange(10)]).expand(2, 16).contiguous()  # two documents in each row


class Batches(list):
    batch_size, sequence_length, num_bytes, num_tokens = 2, 16, 100, 54

    def digest(self):
        return "text"


def scored(engine, positions):
    batch = Batch(IDS[:, :-1], LABELS, positions, 27)
    evaluator = Evaluator([Domain("text", "new", Batches([batch, batch]))], base=BaseStates(tokens=32))
    first = evaluator.run(engine, is_base=True)
    assert [s.positions for s in evaluator.run(engine)] == [s.positions for s in first], "also beside KL to the base"
    return first[0], batch


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # the fused loss, and one that caps its logits
@pytest.mark.parametrize("positions", [None, STARTS], ids=["rows", "documents"])
def test_mean_loss_of_each_bucket(name, positions, monkeypatch):
    monkeypatch.setattr("pretrain.evaluation.positions.BUCKETS", 8)
    engine = engine_of(name)
    score, batch = scored(engine, positions)
    engine.model.eval()
    with torch.no_grad():
        given = {} if positions is None else {"position_ids": positions}
        logits = engine.model.hf(input_ids=batch.input_ids, use_cache=False, **given).logits
        nats = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), ignore_index=IGNORE, reduction="none").view(
            2, 16
        )
        at = torch.arange(16).expand(2, 16) if positions is None else positions
        assert score.loss == engine.evaluate(batch).double().item() * 2 / 54, "the bits of the loss stay"
    found = score.positions
    assert found.width == 2
    assert sum(found.tokens) == 54
    for i, (loss, tokens) in enumerate(zip(found.loss, found.tokens, strict=True)):
        here = (at // 2 == i) & (LABELS != IGNORE)
        assert tokens == 2 * int(here.sum())
        if positions is not None and i >= 5:
            assert loss is None, "no document is that long"
        else:
            assert loss == pytest.approx(float(nats[here].mean()), rel=1e-5)


@pytest.mark.parametrize(("length", "width", "count"), [(1, 1, 1), (16, 1, 16), (17, 2, 9), (1024, 64, 16)])
def test_buckets_cover_a_sequence(length, width, count):
    assert Buckets.of(length) == Buckets(width, count)


def positions(step, loss, tokens=(40, 40, 40), digest="a"):
    return {"event": "positions", "step": step, "time": 0.0, "domain": "law", "role": "new", "digest": digest} | {
        "width": 64, "loss": loss, "tokens": list(tokens)
    }  # fmt: skip


def page(*records):
    return run_page(Run("mine", History([started(), evaluation(0, "law", "new", 3.0, 0.0), *records])))


def test_the_report_shows_before_and_after_in_one_chart():
    text = page(positions(0, [3.0, 2.0, 5.5]), positions(5, [9.0, 9.0, 9.0]), positions(10, [2.5, 1.5, 1.25]))
    assert "Loss by position, law (new): step 0 from 3 to 5.5; step 10 from 2.5 to 1.25" in text
    assert "not shown" not in text


def test_other_text_is_not_compared():
    text = page(positions(0, [3.0, 2.0, 5.5], digest="b"), positions(10, [2.5, 1.5, 1.25]))
    assert 'aria-label="Loss by position, law (new): step 10 from 2.5 to 1.25"' in text


def test_what_was_not_measured_is_not_shown():
    text = page(positions(0, [3.0, 2.0, None], tokens=(40, 32, 0)), positions(10, [2.5, 1.5, 7.7], tokens=(40, 32, 31)))
    assert "step 0 from 3 to 2; step 10 from 2.5 to 1.5" in text
    assert "between the positions 128 and 191 are buckets with fewer than 32 held-out tokens" in text
    text = page(positions(10, [2.5, None, None], tokens=(40, 0, 0)))
    assert "Loss by position, law (new): step" not in text
    assert "between the positions 64 and 191" in text


def test_a_roll_back_removes_later_ones():
    history = History([positions(0, [3.0]), positions(5, [2.0]), positions(10, [1.0])])
    history.cut(4)
    assert [record["step"] for record in history.positions["law"]] == [0]


def test_means_of_sums():
    found = Buckets(4, 2).losses(torch.tensor([[6.0, 0.0], [3.0, 0.0]], dtype=torch.float64))
    assert found == PositionLosses(4, (2.0, None), (3, 0))
    assert not any(math.isnan(loss) for loss in found.loss if loss is not None)
