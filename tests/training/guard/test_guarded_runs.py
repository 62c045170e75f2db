"""Whole runs in which one batch is bad: skipped, rolled back or stopped at, killed around it, by several processes."""

import json
import math
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.store import load
from pretrain.runtime.files import partial_of
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.training.guard.guard import Guard
from tests.runs import assert_same_run, numbers, wait_for


def weights(run: Path, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    files = load(run / f"checkpoints/step-{step:08d}")["engine"][kind]
    return {name: files.read(name) for name in sorted(files.keys())}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_records(run: Path) -> list[dict]:
    return [r for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]


def quarantined(run: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "time"} for r in read_records(run / "quarantine.jsonl")]


@pytest.fixture
def nan_run(bad_run, overflowing_model):
    """``nan_run(dropout) -> (arguments, step)``: the batch of one step has no finite loss."""

    def make(dropout: float = 0.0) -> tuple[list[str], int]:
        given, step = bad_run(12, 14)
        return [*given, f"model_name={overflowing_model(dropout)}"], step

    return make


@pytest.fixture
def ran(command, tmp_path):
    """``ran(name, arguments)``: the folder of a run that must end well."""

    def run(name: str, arguments: list[str]) -> Path:
        code, _, err = command([*arguments, f"output_dir={tmp_path / name}"])
        assert code == 0, err
        return tmp_path / name

    return run


def test_skip_leaves_weights_and_moments_and_says_what_was_in_the_batch(nan_run, ran, bad_corpus):
    given, bad = nan_run(dropout=0.1)
    run = ran("run", [*given, "save_every=1", "checkpoint.keep_last=null"])
    assert not (run / f"checkpoints/step-{bad:08d}").exists(), "no checkpoint of weights that nobody has seen at work"
    ending = ran("ending", [*given, f"max_steps={bad}", "save_every=1"])
    for kind in ("model", "optimizer"):
        assert equal(weights(ending, bad - 1, kind), weights(ending, bad, kind))
        assert not equal(weights(run, bad - 1, kind), weights(run, bad + 1, kind))
    for record in train_records(run):
        assert (record["loss"] is None) == (record["grad_norm"] is None) == (record["step"] == bad)
        assert record["skipped_steps"] == (record["step"] >= bad)
    (record,) = quarantined(run)
    documents = record.pop("documents")
    numbers_of_it = {"loss": None, "grad_norm": None, "zscore": None, "first_sample": 4 * (bad - 1)}
    assert record == {"step": bad, "reason": "nonfinite", "action": "skip"} | numbers_of_it
    garbage = next(d for d in documents if d["path"] == str(bad_corpus / "garbage.txt"))
    assert "~" in garbage["excerpt"]
    assert garbage["excerpt"] in (bad_corpus / "garbage.txt").read_text()
    for document in documents:
        assert len(document["excerpt"]) <= 200
        assert document["excerpt"].split("<|")[0].strip() in Path(document["path"]).read_text()


def test_rollback_ends_where_skip_ends(nan_run, ran):
    """Nothing random in the model: without the batch both are the same run."""
    given, bad = nan_run()
    skipped, back = (ran(action, [*given, f"guard.nonfinite={action}"]) for action in ("skip", "rollback"))
    for kind in ("model", "optimizer"):
        assert equal(weights(skipped, 20, kind), weights(back, 20, kind))
    assert numbers(skipped) == numbers(back), "each step once, the passed over one with no loss"
    (record,) = [r for r in read_records(back / "metrics.jsonl") if r["event"] == "rollback"]
    assert (record["step"], record["bad_step"], record["reason"]) == (10, bad, "nonfinite")
    assert quarantined(back) == [quarantined(skipped)[0] | {"action": "rollback"}]
    assert read_run_file(back)["steps"] == 20


def test_rollback_without_a_checkpoint_skips(nan_run, ran):
    given, _ = nan_run()
    skipped, back = (
        ran(action, [*given, f"guard.nonfinite={action}", "save_every=null"]) for action in ("skip", "rollback")
    )
    assert numbers(skipped) == numbers(back)


def test_stop_saves_nothing_bad_and_the_same_command_goes_on(nan_run, ran, command, tmp_path):
    given, bad = nan_run(dropout=0.1)
    given.append("save_every=2")
    run = tmp_path / "run"
    code, _, err = command([*given, f"output_dir={run}", "guard.nonfinite=stop"])
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"guard.nonfinite=stop: step {bad}: loss nan, gradient norm nan; nothing of this step is saved" in line
    assert "garbage.txt#0" in line
    assert "Traceback" not in err
    assert read_run_file(run)["status"] == "failed"
    saved = sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir())
    assert max(saved) == (bad - 1) // 2 * 2
    assert all(t.isfinite().all() for n, t in weights(run, max(saved)).items() if "embed" not in n)
    assert numbers(ran("run", given)) == numbers(ran("whole", given))
    assert quarantined(run) == quarantined(tmp_path / "whole")


@pytest.mark.parametrize("action", [pytest.param("skip", marks=pytest.mark.slow), "rollback"])
def test_kill_9_behind_a_bad_step(action, nan_run, ran, spawn, tmp_path):
    """Whether the checkpoint it resumes from is of before the step or of behind it."""
    given, bad = nan_run(dropout=0.1)
    given.append(f"guard.nonfinite={action}")
    whole, run = ran("whole", given), tmp_path / "run"
    for at in (bad, 17):
        process = spawn([*given, f"output_dir={run}"])
        wait_for(run, at, process)
        process.kill()
        process.wait()
    ran("run", given)
    assert_same_run(run, whole)
    assert quarantined(run) == quarantined(whole)


@pytest.mark.parametrize("action", [pytest.param("skip", marks=pytest.mark.slow), "rollback"])
def test_hearing_of_it_a_step_later_changes_nothing(action, nan_run, ran, monkeypatch):
    """As on a GPU, where the host reads a verdict when the next step has been queued."""
    given, _ = nan_run(dropout=0.1)
    given.append(f"guard.nonfinite={action}")
    at_once, made = ran("at_once", given), Guard.__init__

    def late(self, *positional, **keys):
        made(self, *positional, **keys)
        self._late = True

    monkeypatch.setattr(Guard, "__init__", late)
    assert_same_run(ran("late", given), at_once)


FSDP = [
    ["strategy=fsdp", "precision=bf16-true"],
    pytest.param(["strategy=fsdp"], marks=pytest.mark.slow),
    pytest.param(["strategy=fsdp", "precision=16-mixed", "precision.allow_cpu=true"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("setting", FSDP, ids=" ".join)
def test_shards_of_which_the_device_leaves_out_the_update(setting, nan_run, ran, monkeypatch):
    from pretrain.strategy.engine import Engine

    given, _ = nan_run()
    by_host, update = ran("host", [*given, *setting]), Engine.update

    def by_device(self, refused):
        self.decides_on_device = True
        update(self, refused)

    monkeypatch.setattr(Engine, "update", by_device)
    device = ran("device", [*given, *setting])
    assert numbers(device) == numbers(by_host)
    ours, theirs = weights(device, 20), weights(by_host, 20)
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in theirs)


TWO = [
    ("fsdp", ["guard.nonfinite=rollback"]),
    *(pytest.param("ddp", [f"guard.nonfinite={a}"], marks=pytest.mark.slow) for a in ("skip", "rollback", "stop")),
    *(pytest.param("fsdp", [f"guard.nonfinite={a}"], marks=pytest.mark.slow) for a in ("skip", "stop")),
    *(
        pytest.param("deepspeed", [f"guard.nonfinite={a}", f"strategy.zero_stage={s}"], marks=pytest.mark.slow)
        for a in ("skip", "rollback")
        for s in (0, 1, 2, 3)
    ),
]


@pytest.mark.parametrize(
    ("strategy", "more"), TWO, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_two_processes_come_to_the_same_verdict(strategy, more, nan_run, command, tmp_path):
    given, _ = nan_run()
    pair = [*given, f"strategy={strategy}", "devices=2", "batch_size=1", *more, f"output_dir={tmp_path / 'pair'}"]
    alone = [*given, *(m for m in more if m.startswith("guard.")), f"output_dir={tmp_path / 'alone'}"]
    code = 2 if "guard.nonfinite=stop" in more else 0
    for arguments in (pair, alone):
        left, _, err = command(arguments)
        assert left == code, err
    assert_close_runs(tmp_path / "pair", tmp_path / "alone")


def assert_close_runs(run: Path, reference: Path) -> None:
    ours, theirs = train_records(run), train_records(reference)
    assert [(r["step"], r["skipped_steps"]) for r in ours] == [(r["step"], r["skipped_steps"]) for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == (None if b["loss"] is None else pytest.approx(b["loss"], abs=1e-5))
    ours, theirs = quarantined(run), quarantined(reference)
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "zscore", "grad_norm"):
            a.pop(key), b.pop(key)
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "stop"])
def test_an_infinite_gradient_of_a_finite_loss(action, bad_run, steep_model, command, ran, tmp_path):
    """Judged by the norm alone, in a whole run."""
    given, bad = bad_run(12, 14)
    given += [f"model_name={steep_model}", "save_every=1", "checkpoint.keep_last=null"]
    run = tmp_path / "run"
    code, _, err = command([*given, f"guard.nonfinite={action}", f"output_dir={run}"])
    assert code == (2 if action == "stop" else 0), err
    assert ("guard.nonfinite=stop: step" in err) == (action == "stop")
    for record in train_records(run):
        assert math.isfinite(record["loss"])
        assert (record["grad_norm"] is None) == (record["step"] == bad)
    (record,) = quarantined(run)
    assert (record["step"], record["reason"], record["action"]) == (bad, "nonfinite", action)
    assert math.isfinite(record["loss"])
    assert record["grad_norm"] is None
    ran("run", given)
    assert [r["skipped_steps"] for r in train_records(run)] == [int(step >= bad) for step in range(1, 21)]
    ending = ran("ending", [*given, f"max_steps={bad}"])
    for kind in ("model", "optimizer"):
        assert equal(weights(ending, bad - 1, kind), weights(ending, bad, kind))
        assert all(tensor.isfinite().all() for tensor in weights(run, 20, kind).values())


# -- spikes -----------------------------------------------------------------------------------------------------------

SPIKE = ["guard.spike=skip", "guard.window=16", "lr=1e-2", "scheduler=constant", "warmup_proportion=0", "max_steps=50"]
SPIKE += ["evaluate_every=null", "save_every=10"]


@pytest.fixture
def spike_run(bad_run):
    given, step = bad_run(41, 46)
    return [*given, *SPIKE], step


def test_a_spike_is_skipped_and_the_window_outlives_a_stop(spike_run, ran, command, tmp_path):
    given, bad = spike_run
    whole = ran("whole", given)
    (record,) = quarantined(whole)
    assert (record["step"], record["reason"]) == (bad, "spike")
    assert record["zscore"] > 8
    assert math.isfinite(record["loss"])
    assert [r["step"] for r in train_records(whole) if r["skipped_steps"]] == list(range(bad, 51))
    ran("halves", [*given, "max_steps=40"])
    halves = ran("halves", given)
    assert [r for r in numbers(halves) if r["event"] == "train"] == [r for r in numbers(whole) if r["event"] == "train"]
    assert equal(weights(halves, 50), weights(whole, 50))


def test_a_spike_is_rolled_back(spike_run, ran):
    given, bad = spike_run
    skipped, back = ran("skip", given), ran("rollback", [*given, "guard.spike=rollback"])
    assert equal(weights(skipped, 50), weights(back, 50))
    assert [r["bad_step"] for r in read_records(back / "metrics.jsonl") if r["event"] == "rollback"] == [bad]


@pytest.mark.slow
def test_a_spike_stops_the_run_and_the_same_command_goes_on(spike_run, ran, command, tmp_path):
    given, bad = spike_run
    run = tmp_path / "run"
    code, _, err = command([*given, f"output_dir={run}", "guard.spike=stop"])
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert f"guard.spike=stop: step {bad}: loss " in line
    assert "robust standard deviations up" in line
    assert "garbage.txt#0" in line
    assert "Traceback" not in err
    assert read_run_file(run)["status"] == "failed"
    assert max(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").iterdir()) == 40
    assert numbers(ran("run", given)) == numbers(ran("whole", given))
    assert quarantined(run) == quarantined(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3], ids=lambda s: f"zero_stage={s}")
def test_deepspeed_leaves_a_spike_out(stage, spike_run, ran):
    """And its gradients do not come into the next update, whose norm is, but for rounding, that of one process."""
    given, bad = spike_run
    alone = ran("alone", given)
    sharded = [*given, "strategy=deepspeed", f"strategy.zero_stage={stage}", "devices=2", "batch_size=1"]
    sharded += ["save_every=1", "checkpoint.keep_last=null"]
    for last in (bad - 1, bad):  # where a run ends it saves, whatever the step was like
        ran("pair", [*sharded, "save_every=null", f"max_steps={last}"])
    pair = ran("pair", [*sharded, f"max_steps={bad + 1}"])
    for kind in ("model", "optimizer"):
        before, after, later = (weights(pair, step, kind) for step in (bad - 1, bad, bad + 1))
        assert equal(before, after)
        assert not equal(after, later)
    ours, theirs = (train_records(run)[bad - 1 : bad + 1] for run in (pair, alone))
    assert [r["skipped_steps"] for r in ours] == [1, 1]
    assert ours[1]["grad_norm"] == pytest.approx(theirs[1]["grad_norm"], rel=0.05)
    assert quarantined(pair)[0]["documents"] == quarantined(alone)[0]["documents"]


# -- what is no matter of the guard -----------------------------------------------------------------------------------


def test_a_healthy_run_is_the_same_with_and_without(base_arguments, ran):
    off = ["guard.nonfinite=ignore", "guard.spike=ignore"]
    unwatched, watched = ran("off", [*base_arguments, *off]), ran("on", [*base_arguments, "guard.spike=skip"])
    assert numbers(unwatched) == numbers(watched)
    for kind in ("model", "optimizer"):
        assert equal(weights(unwatched, 20, kind), weights(watched, 20, kind))
    assert not (watched / "quarantine.jsonl").exists()
    assert json.loads((watched / "checkpoints/step-00000020/state.json").read_text())["guard"]["passed_over"] == []


def test_a_quarantine_that_cannot_be_written_is_worth_less_than_the_run(nan_run, command, tmp_path):
    given, _ = nan_run()
    partial_of(tmp_path / "run" / "quarantine.jsonl").mkdir(parents=True)
    code, _, err = command([*given, f"output_dir={tmp_path / 'run'}"])
    assert code == 0, err
    assert err.count("quarantine.jsonl can't be written") == 1


def test_a_checkpoint_that_was_bad_itself_is_not_gone_back_to_twice(nan_run, command, tmp_path, monkeypatch):
    """The weights of step 6 are NaN and are saved before anybody knows: the run goes back to them, then to those before."""
    from pretrain.training.trainer import Trainer

    given, _ = nan_run()
    train_step = Trainer.train_step

    def spoil(self, batch):
        result = train_step(self, batch)
        if self.state.step == 6 and not getattr(self, "spoilt", False):
            self.spoilt = True
            with torch.no_grad():
                next(self.engine.model.parameters()).fill_(math.nan)
        return result

    monkeypatch.setattr(Trainer, "train_step", spoil)
    run = tmp_path / "run"
    more = ["guard.nonfinite=rollback", "guard.max_rollbacks=9", "save_every=1", "evaluate_every=null", "max_steps=11"]
    code, _, err = command([*given, *more, f"output_dir={run}"])
    assert code == 0, err
    assert err.count("rolled back to ") == 2
    assert "step-00000006" in err
    assert "step-00000005" in err
    assert not any(tensor.isnan().any() for tensor in weights(run, 11).values())
