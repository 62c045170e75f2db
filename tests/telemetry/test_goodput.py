"""Goodput counts the time since a run was first started, and of its steps only those that are kept."""

import json
import time

import pytest

from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.goodput import Goodput
from pretrain.telemetry.history import History
from pretrain.telemetry.monitor import history_until

NOW = 10_000.0


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)


def record(event, step, at, **numbers):
    return {"event": event, "step": step, "time": at} | numbers


class Resumed:
    """A start of the run in ``folder``, with what the monitor does for its goodput."""

    def __init__(self, folder, step=8, **start):
        event = RunStarted(step, total_steps=20, **{"resumed": step > 0} | start)
        self.history = history_until(folder, event, History())
        self.goodput = Goodput(folder)
        self.goodput.start(event, self.history)
        self.history.add(record("run_started", step, NOW))

    def trains(self, step, step_seconds):
        self.history.add(record("train", step, NOW, step_seconds=step_seconds))

    def share(self):
        return self.goodput.share(self.history.trained_seconds)


@pytest.fixture
def crashed(tmp_path):
    """Started 1000 s ago; ten steps of 10 s, a checkpoint at 8, then a crash; started again 500 s ago at 8; two more steps."""
    records = [record("run_started", 0, NOW - 1000)]
    records += [record("train", step, NOW - 990 + 10 * step, step_seconds=10.0) for step in (1, 4, 8, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "run.json").write_text(json.dumps({"started_at": NOW - 1000}))
    return tmp_path


def test_steps_that_were_lost_and_the_time_between_starts_are_not_good(crashed):
    goodput = Resumed(crashed)
    assert goodput.share() == pytest.approx(80 / 1000)
    goodput.trains(10, 10.0)
    assert goodput.share() == pytest.approx(100 / 1000)
    goodput.history.cut(8)
    assert goodput.share() == pytest.approx(80 / 1000)


def test_a_run_from_before_run_json_knew_its_start(crashed):
    (crashed / "run.json").unlink()
    goodput = Resumed(crashed)
    assert goodput.share() == pytest.approx(80 / 1000)


@pytest.mark.parametrize("left", [None, '{"event": "run_sta\n{}\n'])
def test_without_records_of_earlier_starts_there_is_no_number(crashed, left):
    (crashed / "metrics.jsonl").unlink() if left is None else (crashed / "metrics.jsonl").write_text(left)
    goodput = Resumed(crashed)
    goodput.trains(9, 10.0)
    assert goodput.share() is None


def test_a_new_run_in_an_old_folder_has_its_own_time(crashed, monkeypatch):
    goodput = Resumed(crashed, 0)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    goodput.trains(1, 50.0)
    assert goodput.share() == pytest.approx(0.5)


@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_jumps_after_the_start_does_not_count(hours, crashed, monkeypatch):
    goodput = Resumed(crashed)
    monkeypatch.setattr(time, "time", lambda: NOW + hours * 3600)
    assert goodput.share() == pytest.approx(80 / 1000)


def test_workers_that_were_restarted_before_the_first_checkpoint_have_lost_that_time(crashed, monkeypatch):
    goodput = Resumed(crashed, 0, facts={"launch_restarts": 1})
    goodput.trains(1, 50.0)
    assert goodput.share() == pytest.approx(50 / 1000)


def test_a_window_begins_where_its_process_did():
    records = [record("run_started", 0, 0.0), record("train", 5, 0.0, step_seconds=2.0)]
    records += [record("run_started", 7, 0.0), record("train", 8, 0.0, step_seconds=3.0)]
    records += [record("rollback", 8, 0.0), record("train", 10, 0.0, step_seconds=1.0)]
    assert History(records).trained_seconds == 15.0


def test_a_window_whose_beginning_is_lost_is_not_counted():
    records = [record("train", step, 0.0, step_seconds=2.0) for step in (40, 50)]
    assert History(records).trained_seconds == 20.0
    assert History([record("run_started", 30, 0.0), *records]).trained_seconds == 40.0


@pytest.mark.parametrize(
    "line", ['{"event": "train", "step": 8}', '{"event": "train", "step": 8, "step_seconds": null}']
)
def test_a_record_that_is_none_is_worth_less_than_the_run(crashed, line):
    with (crashed / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    goodput = Resumed(crashed)
    assert goodput.share() is None


def test_a_line_that_is_no_record_changes_nothing(crashed):
    shares = []
    for line in ("", "7\n"):
        with (crashed / "metrics.jsonl").open("a") as file:
            file.write(line)
        goodput = Resumed(crashed)
        shares.append(goodput.share())
    assert shares[0] == pytest.approx(shares[1], rel=0.1)  # seconds that pass meanwhile count


def test_records_that_came_with_a_checkpoint_count(crashed):
    lines = (crashed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (crashed / "metrics.jsonl").write_text("".join(lines[:2]))
    goodput = Resumed(crashed, records=tuple(json.loads(line) for line in lines[2:]))
    assert goodput.share() == pytest.approx(80 / 1000)
