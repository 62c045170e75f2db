"""The aggregate of a run's records: little, whatever its length, and of all of it."""

import pytest

from pretrain.telemetry.curves import MAX_POINTS, Curves
from pretrain.telemetry.history import MAX_LOSSES, History, domain_metrics
from pretrain.telemetry.sinks.terminal_tables import SPARK_WIDTH
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


def test_going_back_takes_the_losses_and_the_seconds_of_training_back():
    history = History([started(), *(train(step) for step in (1, 2, 3))])
    assert [step for step, _ in history.losses] == [1, 2, 3]
    history.cut(1)
    history.add(train(2) | {"loss_mean": 5.0})
    assert list(history.losses)[1:] == [(2, 5.0)]
    assert history.trained_seconds == 2.0
    assert sum(history.seconds.values()) == 4 * (0.95 + 0.25 + 0.05), "what was lost took its time too"


def test_the_memory_of_a_long_run_does_not_grow():
    history = History(train(step) for step in range(1, 10 * MAX_LOSSES))
    assert len(history.losses) == MAX_LOSSES >= SPARK_WIDTH
    assert history.memory_gib == {"memory_gib": 20.5, "host_memory_gib": 3.5}


def test_a_record_that_lacks_a_field_is_reported_or_raised():
    records, invalid = [started(), {"event": "evaluation", "step": 1}, train(2)], []
    history = History(records, on_invalid=lambda number, error: invalid.append((number, str(error))))
    assert invalid == [(2, "'domain'")]
    assert history.train.steps == [2]
    with pytest.raises(KeyError, match="domain"):
        History(records)


def test_the_numbers_that_runs_are_compared_by():
    scores = [
        evaluation(s, *of, -d) for s, d in ((0, 0.0), (9, 0.5)) for of in (("law", "new", 3 - d), ("med", "new", 2.0))
    ]
    history = History([started(), evaluation(0, "old", "base", 2.0, 0.0), train(9), *scores])
    metrics = history.metrics()
    assert {k: metrics[k] for k in ("new_loss", "new_delta", "forgetting")} == {
        "new_loss": 2.25,
        "new_delta": -0.5,
        "forgetting": None,  # it was not scored at the last step
    }
    assert metrics["train_loss"] == train(9)["loss_mean"]
    assert metrics["tokens_per_second"] == train(9)["tokens_per_second"]
    history.add({"event": "run_finished", "step": 9, "status": "finished", "tokens_per_second": 7.0})
    assert history.metrics()["tokens_per_second"] == 7.0
    assert metrics["results"]["law"] == {
        k: v for k, v in evaluation(9, "law", "new", 2.5, -0.5).items() if k not in ("event", "time")
    }
    assert domain_metrics({}) == {"new_loss": None, "new_delta": None, "forgetting": None, "results": {}}
