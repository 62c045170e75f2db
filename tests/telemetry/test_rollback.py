"""A run that goes back to a checkpoint: every sink has each step once, as after a resume."""

import torch

from pretrain.telemetry.events import DomainScore, Evaluated, RolledBack, RunFinished, RunStarted, StepDone
from pretrain.telemetry.monitor import Monitor
from pretrain.telemetry.report.sink import Report
from pretrain.telemetry.run_file import RunFile, read_run_file
from pretrain.telemetry.sinks.jsonl import Jsonl, read_records
from pretrain.telemetry.sinks.terminal import Terminal


def events():
    def step(number):
        numbers = {"loss": torch.tensor(2.0), "grad_norm": torch.tensor(1.0), "skipped": torch.tensor(0)}
        return StepDone(number, epoch=0.1, tokens=number, step_tokens=1, lr=0.1, **numbers)

    yield RunStarted(0, total_steps=4, resumed=False)
    yield from (step(number) for number in (1, 2, 3))
    yield RolledBack(1, bad_step=3, reason="spike")
    yield from (step(number) for number in (2, 3, 4))
    yield Evaluated(4, (DomainScore("d", "new", 2.0, 7.4, 1.1, 5, -0.5),), 0.1)
    yield RunFinished(4, "finished", 4)


def test_each_step_is_told_once(tmp_path, capsys):
    report = Report()
    monitor = Monitor({"report": report, "console": Terminal(), "jsonl": Jsonl()}, run=tmp_path, log_every=1)
    run_file, at_rollback = RunFile(tmp_path), None
    for event in events():
        monitor(event)
        run_file(event)
        if isinstance(event, RolledBack):
            at_rollback = read_run_file(tmp_path)["steps"]
    records = read_records(tmp_path / "metrics.jsonl")
    kinds = ["run_started", "train", "rollback", "train", "train", "train", "evaluation", "run_finished"]
    assert [r["event"] for r in records] == kinds
    assert [r["step"] for r in records if r["event"] == "train"] == [1, 2, 3, 4]
    (rollback,) = [r for r in records if r["event"] == "rollback"]
    assert (rollback["step"], rollback["bad_step"], rollback["reason"]) == (1, 3, "spike")
    assert at_rollback == 1
    assert monitor.history.train.steps == [1, 2, 3, 4]
    assert "finished at step 4/4" in capsys.readouterr().out


def test_a_report_without_a_file_of_records_cuts_its_own(tmp_path):
    report = Report()
    monitor = Monitor({"report": report}, run=tmp_path, log_every=1)
    for event in events():
        monitor(event)
    assert monitor.history.train.steps == [1, 2, 3, 4]
