"""Runs with evaluation tasks: the training does not notice them, and their metrics reach every reader."""

import json

import pytest

from pretrain.telemetry.sinks.jsonl import read_records
from tests.runs import numbers

TASK = ["evaluation.tasks.accuracy._target_=tests.tasks.Accuracy", "allow_targets=[tests]"]


@pytest.fixture
def start(base_arguments, command, tmp_path):
    def run(out, *more):
        return command(
            [*base_arguments, "max_steps=8", "save_every=4", "evaluate_every=4", f"output_dir={tmp_path / out}", *more]
        )

    return run


def metrics(run):
    return [r for r in read_records(run / "metrics.jsonl") if r["event"] == "metric"]


def test_a_run_with_tasks_trains_like_one_without(start, tmp_path):
    assert start("plain")[0] == 0
    code, out, err = start("measured", *TASK, "evaluation.tasks.accuracy.tokens=5", "sink=[console,jsonl,report,csv]")
    assert code == 0, err
    assert numbers(tmp_path / "measured") == numbers(tmp_path / "plain")
    found = metrics(tmp_path / "measured")
    assert [(r["step"], r["name"]) for r in found] == [
        (step, name) for step in (0, 4, 8) for name in ("accuracy", "tokens", "undefined")
    ]
    accuracy, tokens, undefined = found[-3:]
    assert (accuracy["better"], accuracy["stderr"], accuracy["domain"]) == ("higher", 0.25, None)
    assert 0 <= accuracy["value"] <= 1
    assert (tokens["value"], tokens["unit"], tokens["domain"]) == (5.0, "tokens", "other")
    assert undefined["value"] is None
    facts = json.loads((tmp_path / "measured/run.json").read_text())
    assert set(facts["metrics"]) == {"accuracy", "other/tokens", "undefined"}
    assert facts["metrics"]["other/tokens"] == {k: v for k, v in tokens.items() if k not in ("event", "time")}
    assert "other/tokens" in out
    assert "nan" in out
    assert "other/tokens" in (tmp_path / "measured/report.html").read_text()
    assert (tmp_path / "measured/metric.csv").read_text().splitlines()[0].startswith("step,time,name,value,unit,better")


def test_a_task_alone(start, tmp_path):
    code, out, err = start("scored", "task=evaluation", "evaluation.batch_size=2", *TASK)
    assert code == 0, err
    assert [(r["step"], r["name"]) for r in metrics(tmp_path / "scored")] == [
        (0, "accuracy"),
        (0, "tokens"),
        (0, "undefined"),
    ]
    assert "accuracy" in out


@pytest.mark.parametrize(
    ("task", "code", "said"),
    [
        ("Mistaken", 2, "error: the questions are missing: download them first"),
        ("Broken", 1, "KeyError: 'no such key'"),
    ],
)
def test_a_task_that_fails(start, task, code, said, tmp_path):
    if code == 2:
        found, _, err = start("failed", f"evaluation.tasks.mine._target_=tests.tasks.{task}", "allow_targets=[tests]")
        assert found == 2
        assert "Traceback" not in err
    else:
        with pytest.raises(KeyError):
            start("failed", f"evaluation.tasks.mine._target_=tests.tasks.{task}", "allow_targets=[tests]")
        err = (tmp_path / "failed/logs/rank-0.log").read_text()
    assert said in err


def test_a_sweep_by_a_metric_that_nothing_measures(start):
    code, _, err = start("sweep", "-m", "seed=0,1", "sweep.metric=metric/accuracy")
    assert code == 2
    assert "sweep.metric=metric/accuracy: the config has no evaluation.tasks, questions or lm_eval.tasks for it" in err


@pytest.mark.slow
def test_tasks_of_two_processes(start, tmp_path):
    one = ["single", *TASK]
    two = ["sharded", *TASK, "strategy=fsdp", "devices=2", "batch_size=1"]
    for arguments in (one, two):
        code, _, err = start(*arguments)
        assert code == 0, err
    ours, theirs = (
        [(r["step"], r["name"], r["value"]) for r in metrics(tmp_path / run)] for run in ("sharded", "single")
    )
    assert [r for r in ours if r[1] != "accuracy"] == [r for r in theirs if r[1] != "accuracy"]
    assert ours[0] == theirs[0], "before training"
