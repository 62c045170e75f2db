"""What a page keeps of a run: little, whatever its length, and of all of it."""

import pytest

from pretrain.telemetry.report.history import MAX_POINTS, Curves, History
from tests.telemetry.report.records import evaluation, eventful, started, train


def test_a_long_run_becomes_few_points_that_stand_for_all_records():
    curves = Curves()
    steps = 10_007
    for step in range(1, steps + 1):
        curves.add(step, {"loss": 9.0 if step == 5000 else 1.0})
    assert MAX_POINTS / 2 <= len(curves.steps) <= MAX_POINTS
    assert curves.steps == sorted(set(curves.steps))
    assert curves.steps[-1] == steps
    assert max(curves.high("loss")) == 9.0, "a spike of one record is not averaged away"
    assert min(curves.low("loss")) == 1.0
    last = steps - curves.steps[-2]
    total = sum(m * curves.width for m in curves.mean("loss")[:-1]) + curves.mean("loss")[-1] * last
    assert total == pytest.approx(steps - 1 + 9.0)


def test_what_is_no_number_is_left_out():
    curves = Curves()
    curves.add(1, {"loss": None, "lr": 0.5, "loss_scale": float("nan"), "event": "train", "flag": True})
    curves.add(2, {"loss": 2.0})
    assert curves.mean("loss") == [None, 2.0]
    assert curves.mean("lr") == [0.5, None]
    assert not any(curves.has(key) for key in ("loss_scale", "event", "flag", "absent"))


def test_the_seconds_of_the_run_are_added_up_by_what_they_went_to():
    history = History([started(0, total=20), train(1), train(10), started(10, resumed=True), train(15)])
    assert history.seconds == pytest.approx(
        {"data": 1.5, "compute": 9.0, "optimizer": 3.0, "communication": 0.75, "evaluation": 0, "checkpoint": 0.75}
        | {"other": 0.75}
    )


def test_an_older_run_knows_only_its_data_and_its_steps():
    record = {"event": "train", "step": 4, "time": 0.0, "step_seconds": 1.0, "data_seconds": 0.25, "loss": 1.0}
    history = History([record])
    assert history.seconds["data"] == 1.0
    assert history.seconds["other"] == 3.0


def test_going_back_forgets_what_was_beyond():
    history = History(eventful(400))
    history.cut(200)
    assert history.train.steps[-1] == 200
    assert {name: d.last["step"] for name, d in history.domains.items()} == {"law": 200, "english": 200}
    assert history.domains["law"].change() == pytest.approx(-0.7364, abs=1e-4)
    assert [r["step"] for r in history.checkpoints] == [100, 200]
    assert all(r["step"] <= 200 for kept in history.samples.values() for r in kept)
    history.cut(0)
    assert history.train.steps == []
    assert history.domains["law"].change() is None, "it has not been scored since step 0"


def test_samples_are_the_first_and_the_last():
    kept = History(eventful(400)).samples["law", "The court"]
    assert [r["step"] for r in kept] == [0, 400]


def test_a_domain_begins_and_ends_with_its_own_scores():
    records = [evaluation(0, "law", "new", 3.0, 0.0), *(evaluation(s, "law", "new", 2.0, -1.0) for s in range(1, 1000))]
    law = History([*records, evaluation(1000, "law", "new", 1.0, -2.0)]).domains["law"]
    steps, values = law.curve("delta_loss")
    assert law.scores.width > 1
    assert (steps[0], values[0], steps[-1], values[-1]) == (0, 0.0, 1000, -2.0)
    assert len(steps) == len(values) <= 201
