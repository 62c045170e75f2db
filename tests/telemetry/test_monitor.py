"""The monitor reads the device at log steps only, writes null for what is no number, and survives its sinks."""

import json
import math
import re
import time
from pathlib import Path

import pytest
import torch

from pretrain.sweep.measure import measures_of
from pretrain.telemetry.events import (
    DomainScore,
    Evaluated,
    LayerNorms,
    RolledBack,
    RunFinished,
    RunStarted,
    Saved,
    StepDone,
    TrainingPaused,
)
from pretrain.telemetry.history import History
from pretrain.telemetry.monitor import Monitor
from pretrain.telemetry.report.sink import Report
from pretrain.telemetry.run_file import RunFile, read_run_file
from pretrain.telemetry.sinks.jsonl import Jsonl, read_records
from pretrain.telemetry.sinks.terminal import Terminal
from tests.telemetry.fed import CountedReads


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows the same time until the test advances it."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def trained(run):
    return [r for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]


def step_done(step, loss=1.0, **more):
    tensor = torch.tensor(loss).as_subclass(CountedReads)
    return StepDone(
        step,
        epoch=0.1,
        tokens=10 * step,
        step_tokens=10,
        loss=tensor,
        lr=0.1,
        grad_norm=torch.tensor(1.0),
        skipped=torch.tensor(0),
        **more,
    )


def test_values_are_read_at_log_steps_only(tmp_path):
    CountedReads.reads = 0
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=4)
    monitor(RunStarted(0, total_steps=9, resumed=False))
    for step in range(1, 10):
        monitor(step_done(step))
    monitor(RunFinished(9, "finished", 90))
    steps = [r["step"] for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "train"]
    assert steps == [1, 4, 8, 9], "the first, every fourth, the last"
    assert CountedReads.reads == len(steps)


def test_null_instead_of_nan(tmp_path):
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=1, resumed=False))
    monitor(step_done(1, loss=float("nan")))
    score = DomainScore("d", "new", 800.0, float("inf"), None, 5, 0.0)
    monitor(Evaluated(1, (score,), 0.1))
    train, evaluation = read_records(tmp_path / "metrics.jsonl")[-2:]
    assert train["loss"] is None
    assert evaluation["perplexity"] is None
    assert evaluation["loss"] == 800.0


def test_the_mean_is_of_the_steps_of_a_window_that_had_a_loss(tmp_path):
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=4)
    monitor(RunStarted(0, total_steps=8, resumed=False))
    losses = [9.0, 4.0, float("nan"), 2.0, 1.0, 1.0, float("inf"), float("nan")]
    for step, loss in enumerate(losses, start=1):
        monitor(step_done(step, loss))
    train = [r for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "train"]
    assert [(r["step"], r["loss"], r["loss_mean"]) for r in train] == [(1, 9.0, 9.0), (4, 2.0, 3.0), (8, None, 1.0)]


def test_what_is_not_known_is_null(tmp_path):
    """No facts of the device, no loss scaler; then one, as a tensor and as DeepSpeed's number."""
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=3, resumed=False))
    for step, scale in enumerate((None, torch.tensor(65536.0), 1024.0), start=1):
        monitor(step_done(step, loss_scale=scale))
    train = [r for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "train"]
    assert [r["loss_scale"] for r in train] == [None, 65536.0, 1024.0]
    assert {(r["model_flops_per_second"], r["mfu"]) for r in train} == {(None, None)}


def test_several_devices_in_one_process_hide_what_they_say_to_each_other(tmp_path):
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=1, resumed=False, facts={"devices": 4, "world_size": 1}))
    monitor(step_done(1))
    (train,) = [r for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "train"]
    assert train["communication_seconds"] is None
    assert train["tokens_per_second_per_device"] == pytest.approx(train["tokens_per_second"] / 4)


def test_mfu_is_of_one_device(tmp_path, clock):
    """Two sequences of 8 tokens a second at 6 FLOPs a token are 96 FLOP/s, by 4 devices of 240 FLOP/s each."""
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1)
    facts = {"devices": 4, "world_size": 4, "sequence_length": 8, "flops_per_token": 6.0, "peak_flops": 240.0}
    monitor(RunStarted(0, total_steps=2, resumed=False, facts=facts))
    for step in (1, 2):
        clock[0] += 1.0
        monitor(step_done(step, step_samples=2))
    monitor(RunFinished(2, "finished", 20))
    for record in (*trained(tmp_path), read_records(tmp_path / "metrics.jsonl")[-1]):
        assert (record["model_flops_per_second"], record["mfu"]) == (24.0, 0.1)


def test_the_time_left_after_a_resume_goes_by_the_steps_of_this_start(tmp_path, clock):
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1)
    monitor(RunStarted(50, total_steps=100, resumed=True))
    for step, seconds in ((51, 30.0), (52, 2.0), (53, 4.0)):  # the first one compiles
        clock[0] += seconds
        monitor(step_done(step))
    assert [r["eta_seconds"] for r in trained(tmp_path)] == [None, 2.0 * 48, 3.0 * 47]


def test_a_run_that_is_stopped_between_log_steps_tells_of_its_last(tmp_path):
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=4)
    monitor(RunStarted(0, total_steps=9, resumed=False))
    for step in (1, 2, 3):
        monitor(step_done(step))
    monitor(RunFinished(3, "stopped", 30))
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [0, 1, 3, 3]


def test_layers_are_read_at_log_steps_and_a_nan_in_them_is_null(tmp_path):
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=2)
    monitor(RunStarted(0, total_steps=9, resumed=False))
    monitor(step_done(1))
    CountedReads.reads = 0
    norms = torch.tensor([[1.0, float("nan"), 0.5, 0.5]]).as_subclass(CountedReads)
    monitor(step_done(3, layers=LayerNorms(("wte",), norms)))
    assert CountedReads.reads == 0
    monitor(step_done(4))
    (record,) = [r for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "layers"]
    row = {"weight_norm": 1.0, "grad_norm": None, "update_norm": 0.5, "update_ratio": 0.5}
    assert (record["step"], record["layers"]) == (3, {"wte": row})


def test_a_failing_sink_is_dropped_and_said(tmp_path, capsys):
    class Broken:
        def open(self, run, start):
            pass

        def write(self, record):
            raise ConnectionError("no route")

        closed = 0

        def close(self):
            self.closed += 1
            raise ConnectionError("nor now")

    broken = Broken()
    monitor = Monitor({"broken": broken, "jsonl": Jsonl()}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=1, resumed=False))
    monitor(step_done(1))
    monitor(RunFinished(1, "finished", 10))
    assert [r["event"] for r in read_records(tmp_path / "metrics.jsonl")] == ["run_started", "train", "run_finished"]
    assert capsys.readouterr().err.count("sink broken stopped: ConnectionError: no route") == 1
    assert broken.closed == 1, "a bar that is drawn has to go"


def test_a_disk_that_is_full_for_a_while_costs_no_sink(tmp_path, capsys):
    class OnTheDisk:
        def open(self, run, start):
            self.written = []

        def write(self, record):
            if record["step"] in (1, 2):
                Path("/dev/full").write_text("x")
            self.written.append(record["step"])

        def close(self):
            pass

    sink = OnTheDisk()
    monitor = Monitor({"page": sink}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=3, resumed=False))
    for step in (1, 2, 3):
        monitor(step_done(step))
    monitor(RunFinished(3, "finished", 30))
    assert sink.written == [0, 3, 3]
    assert (
        capsys.readouterr().err.count("sink page: No space left on device; writing is retried with the next record")
        == 1
    )


def with_run_file(run):
    """Call a monitor and the listener that writes run.json, as a run does."""
    monitor = Monitor({}, run=run, log_every=1)
    run_file = RunFile(run, monitor.summary)
    return lambda event: (monitor(event), run_file(event))


def test_what_is_shown_of_a_run_comes_from_one_history(tmp_path, capsys):
    """run.json, the console, the report and the metrics of a sweep agree to the last digit, over a resume and a rollback."""

    def start(step):
        sinks = {"jsonl": Jsonl(), "report": Report(), "console": Terminal()}
        monitor = Monitor(sinks, run=tmp_path, log_every=1)
        run_file = RunFile(tmp_path, monitor.summary)

        def emit(*events):
            for event in events:
                monitor(event)
                run_file(event)

        emit(RunStarted(step, total_steps=4, resumed=step > 0, facts={"name": "r"}))
        return monitor, emit

    def evaluated(step, loss):
        return Evaluated(step, (DomainScore("d", "new", loss, math.exp(loss), None, 5, loss - 3.0, None, "text"),), 0.1)

    _, emit = start(0)
    emit(evaluated(0, 3.0), step_done(1, 2.5), step_done(2, 2.0), evaluated(2, 2.0))
    monitor, emit = start(1)  # the score of step 2 was lost
    assert list(read_run_file(tmp_path)["results"]) == ["d"]
    assert read_run_file(tmp_path)["results"]["d"]["step"] == 0
    emit(step_done(2, 2.25), evaluated(2, 2.75), step_done(3, 9.0), evaluated(3, 9.0), RolledBack(2, 3, "spike"))
    assert read_run_file(tmp_path)["results"]["d"]["loss"] == 2.75
    emit(step_done(3, 1.75), step_done(4, 1.5), evaluated(4, 2.5), RunFinished(4, "finished", 40))
    assert read_run_file(tmp_path)["results"] == {
        "d": {"domain": "d", "role": "new", "loss": 2.5, "perplexity": math.exp(2.5), "bits_per_byte": None}
        | {"tokens": 5, "delta_loss": -0.5, "delta_reason": None, "digest": "text", "step": 4}
        | {"kl_to_base": None, "in_context_gain": None}
    }
    read = History(read_records(tmp_path / "metrics.jsonl"))
    assert monitor.history.metrics() == read.metrics() == measures_of(tmp_path)
    assert [read.metrics()[name] for name in ("new_loss", "new_delta", "train_loss")] == [2.5, -0.5, 1.5]
    assert [step for step, _ in read.losses] == [1, 2, 3, 4]
    assert monitor.history.losses == read.losses
    assert "perplexity 20.09 → 12.18, −0.500 nats per token" in (tmp_path / "report.html").read_text()
    assert re.search(r"d \(new\) +20.09 +12.18 +↓ 0.5000 better", capsys.readouterr().out)


def test_run_json_tells_status_and_results(tmp_path):
    listener = with_run_file(tmp_path)
    listener(RunStarted(0, total_steps=2, resumed=False, facts={"world_size": 1}))
    assert read_run_file(tmp_path)["status"] == "running"
    listener(Evaluated(2, (DomainScore("d", "new", 2.0, 7.4, 1.1, 5, -0.5),), 0.1))
    listener(RunFinished(2, "finished", 20, tmp_path / "model"))
    facts = read_run_file(tmp_path)
    assert facts["status"] == "finished"
    assert (facts["steps"], facts["tokens"], facts["world_size"]) == (2, 20, 1)
    assert facts["results"]["d"]["delta_loss"] == -0.5


@pytest.mark.parametrize(
    "damage",
    [
        *(
            {name: value}
            for name in ("results", "restarts", "started_at", "seconds")
            for value in (None, True, "a", [1], {"d": 4})
        ),
        *({"restarts": 1e308}, {"started_at": math.nan}, {"seconds": -math.inf}),
    ],
    ids=str,
)
def test_a_run_goes_on_without_what_is_wrong_in_its_run_json(damage, tmp_path):
    facts = {"results": {"d": {"loss": 1.0}}, "restarts": 2, "started_at": 100.0, "seconds": 7.0, "status": "stopped"}
    (tmp_path / "run.json").write_text(json.dumps(facts | damage))
    listener = with_run_file(tmp_path)
    listener(RunStarted(4, total_steps=8, resumed=True))
    listener(Evaluated(4, (DomainScore("new", "new", 2.0, 7.4, 1.1, 5, -0.5),), 0.1))
    (name,) = damage
    now = read_run_file(tmp_path)
    assert set(now["results"]) == {"new"} | (set() if name == "results" else {"d"})
    assert now["restarts"] == (0 if name == "restarts" else 3)
    assert (now["started_at"] == 100.0) == (name != "started_at")
    assert (now["seconds"] >= 7.0) == (name != "seconds")


@pytest.mark.parametrize("text", ["[1]", "5", "", "{", "[" * 100_000])
def test_a_run_json_that_is_something_else_is_none(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    assert read_run_file(tmp_path) == {}


def test_run_json_has_no_infinity(tmp_path):
    listener = with_run_file(tmp_path)
    listener(RunStarted(0, total_steps=2, resumed=False))
    listener(Evaluated(0, (DomainScore("d", "new", 800.0, float("inf"), None, 5, 0.0),), 0.1))
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["results"]["d"]["perplexity"] is None


def test_what_stood_still_is_taken_from_the_window_it_happened_in(tmp_path, clock):
    """A checkpoint becomes whole behind the run, in the window after."""
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=9, resumed=False))
    for step in (1, 2, 3):
        clock[0] += 1.0
        monitor(step_done(step))
        if step == 1:
            clock[0] += 0.5
            monitor(TrainingPaused(1, 0.5, "checkpoint"))
        if step == 2:
            monitor(Saved(1, Path("step-1"), seconds=1.0, blocked_seconds=0.5, bytes=1))
    assert [r["step_seconds"] for r in trained(tmp_path)] == [1.0, 1.0, 1.0]
    assert [r["checkpoint_seconds"] for r in trained(tmp_path)] == [0.0, 0.5, 0.0]


def test_an_evaluation_that_a_stop_has_ended_is_no_training(tmp_path, clock):
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=4)
    monitor(RunStarted(0, total_steps=9, resumed=False))
    for step in (1, 2):
        clock[0] += 1.0
        monitor(step_done(step))
    clock[0] += 7.0
    monitor(TrainingPaused(2, 7.0, "evaluation"))
    monitor(RunFinished(2, "stopped", 20))
    assert [r["step_seconds"] for r in trained(tmp_path)] == [1.0, 1.0]


def test_the_speed_of_a_run_is_without_its_first_step(tmp_path, clock):
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=2)
    monitor(RunStarted(0, total_steps=4, resumed=False))
    for step, seconds in enumerate((30.0, 1.0, 1.0, 1.0), start=1):
        clock[0] += seconds
        monitor(step_done(step))
    rates = [r["tokens_per_second_run"] for r in trained(tmp_path)]
    assert rates == [pytest.approx(10 / 30), 10.0, 10.0]
    assert monitor.summary()["tokens_per_second"] == 10.0
    assert monitor.summary()["train_seconds"] == 33.0


def test_a_checkpoint_is_the_first_of_what_the_next_brings_along(tmp_path):
    """Its own record came when it was written already."""
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=9, resumed=False))
    monitor(step_done(1))
    monitor(Saved(1, Path("step-1"), seconds=1.0, blocked_seconds=0.5, bytes=1))
    assert [(r["event"], r["step"]) for r in monitor.unsaved()] == [("checkpoint", 1)]


def test_a_rollback_brings_the_records_that_the_file_has_lost(tmp_path):
    """As a disk leaves it that was full up to then."""
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=9, resumed=False))
    for step in (1, 2, 3):
        monitor(step_done(step))
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    monitor(RolledBack(2, bad_step=3, reason="spike"))
    found = [(r["event"], r["step"]) for r in read_records(tmp_path / "metrics.jsonl")]
    assert found == [("run_started", 0), ("train", 1), ("train", 2), ("rollback", 2)]


def test_layers_come_in_the_order_of_steps(tmp_path):
    """W&B passes over a row of a step before the one it has."""
    monitor = Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=4)
    norms = LayerNorms(("wte",), torch.ones(1, 4))
    monitor(RunStarted(0, total_steps=9, resumed=False))
    for step in range(1, 10):
        monitor(step_done(step, layers=norms if step in (2, 3, 6) else None))
        if step == 7:
            monitor(Evaluated(7, (DomainScore("d", "new", 1.0, 2.7, None, 5),), 0.0))
    monitor(RunFinished(9, "finished", 90))
    records = [(r["event"], r["step"]) for r in read_records(tmp_path / "metrics.jsonl")[1:-1]]
    expected = [("train", 1), ("layers", 2), ("layers", 3), ("train", 4), ("layers", 6), ("evaluation", 7)]
    assert records == [*expected, ("train", 8), ("train", 9)]


def test_a_run_that_saves_nothing_keeps_a_bounded_number_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.telemetry.monitor.MAX_UNSAVED", 3)
    monitor = Monitor({}, run=tmp_path, log_every=1)
    monitor(RunStarted(0, total_steps=9, resumed=False))
    for step in range(1, 9):
        monitor(step_done(step))
    assert [r["step"] for r in monitor.unsaved()] == [6, 7, 8]
    assert monitor.summary()["tokens"] == 80
