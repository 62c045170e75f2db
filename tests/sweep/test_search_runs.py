"""Searches and jobs side by side with real runs: in the suite one search; slow: pruning, killing, every launcher."""

import json
import os
import signal
import time

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from pretrain.cli.flags import parse
from pretrain.config.check import conf_dir
from pretrain.config.compose import asks_for_sweep
from pretrain.config.hydra_configs import composing
from pretrain.runtime.errors import UserError
from pretrain.sweep.launchers.side_by_side import shares
from pretrain.sweep.plan import Plan
from pretrain.telemetry.sinks.jsonl import read_records
from tests.cli.test_cli import assert_mistake

pytest.importorskip("optuna")
SIMPLE = ["sink=jsonl", "checkpoint.export=never"]
SEARCH = ["hydra/sweeper=optuna", "lr=tag(log,interval(1e-4,1e-2))"]


@pytest.fixture
def sweep(base_arguments, spawn, tmp_path):
    """Start a sweep in the same folder, again and again; without ``-m`` where a sweeper or launcher is named."""

    def start(*arguments):
        return spawn([*base_arguments, *SIMPLE, f"sweep_dir={tmp_path / 'sweep'}", *arguments])

    return start


def finish(process, code=0):
    out, _ = process.communicate(timeout=500)
    assert process.returncode == code, out
    return out


def jobs(tmp_path):
    return json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]


def statuses(tmp_path):
    return sorted(job["status"] for job in jobs(tmp_path))


def wait_until(process, true):
    """Raises ``AssertionError`` when the process ends before."""
    while not true():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def steps(tmp_path):
    """How far each job has come."""
    files = (tmp_path / "sweep").glob("*/metrics.jsonl")
    return [max((r["step"] for r in read_records(file) if r["event"] == "train"), default=0) for file in files]


@pytest.mark.parametrize(
    ("arguments", "sweep"),
    [
        (["experiment=lr_rewarming"], True),
        (["experiment=lr_rewarming", "lr=1e-3,1e-4"], True),
        (["experiment=lr_rewarming", "hydra.mode=RUN"], False),
        (["experiment=lr_rewarming", "--cfg", "job"], False),
        (["experiment=sample_base"], False),
        (["experiment=lr_rewarmin"], False),
        (["hydra/launcher=joblib"], True),
        (["hydra/sweeper=optuna"], True),
        (["lr=1"], False),
    ],
)
def test_what_is_a_sweep_without_its_flag(arguments, sweep):
    assert asks_for_sweep(parse(arguments)) is sweep


def test_an_experiment_of_another_folder_can_be_a_sweep(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nhydra: {mode: MULTIRUN}\n")
    assert asks_for_sweep(parse(["--config-dir", str(tmp_path), "experiment=mine"]))


@pytest.mark.parametrize(
    ("more", "jobs"),
    [
        (
            [],
            [f"lr={lr} scheduler={s}" for lr in ("0.0001", "0.0003", "0.001", "0.003") for s in ("cosine", "constant")],
        ),
        (["++lr=1e-5,1e-4", "scheduler=cosine"], ["++lr=1e-05 scheduler=cosine", "++lr=0.0001 scheduler=cosine"]),
    ],
)
def test_the_command_line_wins_over_an_experiments_params(more, jobs):
    """As planned, and as Hydra's sweeper will have it."""
    with composing(conf_dir(), None) as hydra:
        words = ["experiment=lr_rewarming", *more]
        plan = Plan(hydra.config_loader, hydra.compose_config("config", words, RunMode.MULTIRUN))
    parsed = OverridesParser.create().parse_overrides(plan.words)
    [launched] = BasicSweeper.split_arguments(parsed, None)
    for found in (plan.jobs, launched):
        assert [" ".join(w for w in job if not w.startswith("experiment")) for job in found] == jobs


@pytest.mark.parametrize(("jobs", "says"), [(2, False), (3, True)])
def test_checking_many_jobs_is_announced(jobs, says, monkeypatch, capsys):
    monkeypatch.setattr("pretrain.sweep.plan.MANY", 2)
    monkeypatch.setattr("pretrain.sweep.plan.check", lambda *given, **options: None)
    monkeypatch.setattr("pretrain.sweep.plan.check_metric", lambda config: None)
    with composing(conf_dir(), None) as hydra:
        words = ["seed=" + ",".join(map(str, range(jobs)))]
        Plan(hydra.config_loader, hydra.compose_config("config", words, RunMode.MULTIRUN)).check({})
    assert (f"checking the configurations of {jobs} jobs" in capsys.readouterr().err) is says


def test_every_place_has_its_gpus():
    assert shares([], 3) == [[], [], []]
    assert shares(["0", "1", "2", "3", "4"], 2) == [["0", "1"], ["2", "3"]]
    assert shares(["GPU-a", "GPU-b"], 2) == [["GPU-a"], ["GPU-b"]]
    with pytest.raises(UserError, match="n_jobs=2: a job needs a GPU of its own, and there are 1"):
        shares(["0"], 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["hydra/sweeper=optuna", "lr=1e-3"], "nothing to search"),
        ([*SEARCH, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: input should be greater than 0"),
        ([*SEARCH, "hydra.sweeper.trials=3"], "hydra.sweeper.trials"),
        ([*SEARCH, "batch_sise=4"], "unknown key 'batch_sise'"),
        (["hydra/sweeper=optuna", "lr=interval(-1,1)"], "lr=-1"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=0", "lr=1,2"], "hydra.launcher.n_jobs=0: input should be"),
    ],
)
def test_mistakes(arguments, reason, command, tmp_path):
    assert_mistake(command([*arguments, f"sweep_dir={tmp_path / 'sweep'}"]), reason)
    assert not list(tmp_path.glob("sweep/*/metrics.jsonl"))


def test_a_search_of_real_runs_side_by_side(sweep, tmp_path):
    arguments = [*SEARCH, "hydra/launcher=joblib", "hydra.sweeper.n_trials=2", "max_steps=8"]
    finish(sweep(*arguments))
    table = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [job["status"] for job in table["jobs"]] == ["finished"] * 2
    journal = (tmp_path / "sweep/optuna.journal").read_text()
    assert all(f"[{job['objective']}]" in journal for job in table["jobs"])
    assert len({job["objective"] for job in table["jobs"]}) == 2
    finish(sweep(*arguments))
    assert jobs(tmp_path) == table["jobs"], "nothing was run again"


LONG = ["max_steps=600", "evaluate_every=20", "save_every=null"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_bad_trials_are_pruned(launcher, sweep, tmp_path):
    """Learning rates of which most are far too high: one that beats all the earlier ones every time is out of the question."""
    arguments = ["hydra/sweeper=optuna", f"hydra/launcher={launcher}", "lr=tag(log,interval(1e-3,1))", *LONG]
    arguments += ["hydra.sweeper.startup_trials=1", "hydra.sweeper.n_trials=5"]
    out = finish(sweep(*arguments))
    assert set(statuses(tmp_path)) == {"finished", "pruned"}, out
    for job in jobs(tmp_path):
        run = json.loads((tmp_path / "sweep" / job["folder"] / "run.json").read_text())
        assert (run["status"], run["steps"] < 600) == (
            ("finished", False) if job["status"] == "finished" else ("stopped", True)
        )
        assert (f"{job['name']}: worse than the median" in out) is (job["status"] == "pruned")
    before = jobs(tmp_path)
    finish(sweep(*arguments))
    assert jobs(tmp_path) == before, "nothing was run again"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("kind", [["lr=1e-3,2e-3"], [*SEARCH, "hydra.sweeper.n_trials=2"]], ids=["grid", "search"])
def test_jobs_side_by_side_stop_and_go_on(kind, how, sweep, tmp_path):
    """Two jobs of two processes each, at the same time: every group of processes has found a port of its own."""
    arguments = [*kind, "hydra/launcher=joblib", "strategy=ddp", "devices=2", "batch_size=1", *LONG]
    process = sweep(*arguments)
    wait_until(process, lambda: len(steps(tmp_path)) == 2 and min(steps(tmp_path)) >= 5)
    os.kill(process.pid, how)
    out = finish(process, 75 if how != signal.SIGKILL else -how)
    out = finish(sweep(*arguments))
    assert statuses(tmp_path) == ["finished"] * 2, out
    for job in jobs(tmp_path):
        run = json.loads((tmp_path / "sweep" / job["folder"] / "run.json").read_text())
        assert (run["steps"], run["restarts"], run["world_size"]) == (600, 1, 2)


@pytest.mark.slow
def test_submitit_local(sweep, tmp_path):
    finish(sweep("hydra/launcher=submitit_local", "lr=1e-3,2e-3"))
    assert statuses(tmp_path) == ["finished"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["lr_rewarming", "global_batch", "strategies"])
def test_experiments(experiment, base_arguments, spawn, tmp_path):
    own = ("lr=", "gradient_accumulation_steps=", "evaluate_every=", "save_every=", "max_steps=")
    arguments = [a for a in base_arguments if not a.startswith(own)]
    arguments += [f"experiment={experiment}", "hydra/launcher=joblib", "max_steps=4", f"sweep_dir={tmp_path / 'sweep'}"]
    finish(spawn([*arguments, "sink=jsonl"]))
    assert set(statuses(tmp_path)) == {"finished"}
    assert len(jobs(tmp_path)) == {"lr_rewarming": 8, "global_batch": 9, "strategies": 3}[experiment]
