"""Sweeps as people run them: fresh processes, failures that stop nobody, interruptions of every kind."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pretrain.telemetry.sinks.jsonl import read_records
from tests.runs import wait_for

ROOT = Path(__file__).parents[2]
ROLES = {"new_loss": ("new", "loss"), "new_delta": ("new", "delta_loss"), "forgetting": ("base", "delta_loss")}


def run(spawn, arguments, **options):
    process = spawn(["-m", *arguments], cwd=ROOT, **options)
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def told(folder):
    return json.loads((folder / "sweep.json").read_text())


def started_at(job):
    """When each process of the job's run began."""
    return [r["time"] for r in read_records(job / "metrics.jsonl") if r["event"] == "run_started"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of the sweep below, its exit code and what it said; run by the first test that asks for it."""
    return {"base": tmp_path_factory.mktemp("swept")}


@pytest.fixture
def sweep(swept, base_arguments, spawn):
    """Two jobs: the first one can't have the devices it asks for. Part of each comes from a folder of the user's own."""
    if "code" not in swept:
        base = swept["base"]
        (base / "conf/experiment").mkdir(parents=True)
        (base / "conf/experiment/mine.yaml").write_text("# @package _global_\nmax_steps: 3\n")
        rest = [a for a in base_arguments if not a.startswith("max_steps=")]
        own = ["--config-dir", str(base / "conf"), "experiment=mine", f"sweep_dir={base / 'sweep'}"]
        swept["arguments"] = [*own, *rest, "devices=2,1"]
        swept["code"], swept["out"] = run(spawn, swept["arguments"])
    return swept


def test_a_job_that_fails_stops_no_other_and_is_named(sweep):
    assert sweep["code"] == 2
    failed, finished = told(sweep["base"] / "sweep")["jobs"]
    assert (failed["status"], failed["exit_code"], failed["objective"]) == ("failed", 2, None)
    assert failed["error"].startswith("devices=2: strategy=single is one process")
    assert (finished["status"], finished["exit_code"], finished["error"]) == ("finished", 0, None)
    table = sweep["out"].partition("new_loss")[2]
    assert f"{failed['name']} failed: {failed['error']}" in table
    assert table.strip().endswith("sweep.html")
    assert "Traceback" not in sweep["out"]


def test_folders_are_named_by_what_is_swept(sweep):
    folder = sweep["base"] / "sweep"
    assert [job["folder"] for job in told(folder)["jobs"]] == ["devices=2", "devices=1"]
    assert (folder / "devices=1/model").is_dir()
    assert read_records(folder / "devices=1/metrics.jsonl")[-1]["step"] == 3, "--config-dir reaches the jobs"


def test_the_numbers_are_those_of_the_run(sweep):
    made = told(sweep["base"] / "sweep")
    _, finished = made["jobs"]
    results = json.loads((sweep["base"] / "sweep" / finished["folder"] / "run.json").read_text())["results"]
    for name, (role, field) in ROLES.items():
        [value] = [score[field] for score in results.values() if score["role"] == role]
        assert finished[name] == value
    assert finished["objective"] == finished["new_loss"]
    assert (made["status"], made["best"], made["pareto"]) == ("finished", 1, [1])
    assert "Best of 1" in (sweep["base"] / "sweep/sweep.html").read_text()


def test_the_same_command_again_tries_only_what_failed(sweep, spawn):
    folder = sweep["base"] / "sweep"
    before = told(folder)["jobs"]
    code, out = run(spawn, sweep["arguments"])
    assert code == 2, out
    failed, finished = told(folder)["jobs"]
    assert failed["seconds"] > before[0]["seconds"]
    assert finished == before[1]
    assert len(started_at(folder / "devices=1")) == 1
    assert "devices=1: already finished, not run again" in out


def test_killed_and_run_again(base_arguments, spawn, tmp_path):
    """kill -9 of the sweep alone: its job saves and ends by itself, and continues with the same command."""
    folder = tmp_path / "sweep"
    arguments = [*base_arguments, "max_steps=300", "evaluate_every=null", "save_every=null", "sink=jsonl"]
    arguments += ["lr=1e-3", f"sweep_dir={folder}"]
    process = spawn(["-m", *arguments], cwd=ROOT)
    wait_for(folder / "job", 5, process)
    process.kill()
    process.wait()
    code, out = run(spawn, arguments)
    assert code == 0, out
    starts = [r for r in read_records(folder / "job/metrics.jsonl") if r["event"] == "run_started"]
    assert len(starts) == 2
    assert starts[1]["step"] >= 5, "it went on where it had saved"
    assert told(folder)["jobs"][0]["status"] == "finished"


MISTAKES = [
    (["lr=1e-3,2e-3", "lerning_rate=1,2"], "unknown key 'lerning_rate'; here it is 'lr'"),
    (["strategy=single,ddp,fdsp"], "strategy=fdsp: no such choice; did you mean 'fsdp'"),
    (["strategy=single,fsdp", "strategy.reshard_after_forward=true"], "has no 'reshard_after_forward'"),
    (["lr=1e-3,2e-3,-1"], "lr=-1: input should be greater than 0"),
    (["seed=0,1", "optimizer.beta9=0.9"], "AdamW has no 'beta9'"),
    (["seed=0,1", "sweep.metric=new_los"], "sweep.metric='new_los': string should match"),
    (["seed=0,1", "sweep.direction=up"], "sweep.direction='up': input should be 'minimize' or 'maximize'"),
    (["seed=0,1", "output_dir=there"], "every job of a sweep has its own folder"),
    (["seed=0,1", "sweep.metrik=new_loss"], "sweep: SweepConfig has no 'metrik'; did you mean 'metric'"),
    (["seed=0,1", "sweep.metric=pyton.loss"], "no such domain is evaluated; did you mean 'python'"),
    (["lr=1e-3,2e-3", "--cfg", "job"], "--cfg shows one configuration"),
    (["sweep_dir=a,b"], "can't be swept"),
    (["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: input should be"),
    (["hydra/sweeper=optuna", "lr=1e-3"], "nothing to search"),
    (["hydra/sweeper=optuna", "lr=interval(1e-3,1e-5)"], "error: lr=interval(1e-3,1e-5): "),
    (["seed=0,1", "hydra.sweep.subdir=x"], "a job's folder is named by its overrides"),
    (["lr=interval(1e-4,1e-3)"], "only a sweeper that searches supports intervals"),
]


@pytest.mark.parametrize(("arguments", "says"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_in_any_job_is_found_before_the_first_starts(arguments, says, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)
    code, _, err = command(["-m", *arguments])
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert says in errors[0]
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_every_job_fails(spawn, tmp_path):
    code, out = run(
        spawn, ["seed=0,1", "devices=2", "hydra.sweeper.max_batch_size=1", f"sweep_dir={tmp_path / 'sweep'}"]
    )
    assert code == 2
    assert out.splitlines()[-1].startswith(
        "error: every job of the sweep failed; the first one: devices=2: strategy=single"
    )
    assert told(tmp_path / "sweep")["status"] == "failed"


# Minutes -------------------------------------------------------------------------------------------------------------


def processes_of(folder):
    """Ids of the processes whose command line names ``folder``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_eight_jobs_killed_stopped_and_finished_by_the_same_command(base_arguments, spawn, tmp_path):
    """Two strategies × four learning rates on two processes each; kill -9 of all of it, then SIGTERM, then to the end."""
    folder = tmp_path / "sweep"
    arguments = [*base_arguments, "max_steps=60", "sink=jsonl", f"sweep_dir={folder}", "devices=2", "batch_size=1"]
    arguments += ["lr=1e-4,3e-4,1e-3,3e-3", "strategy=ddp,fsdp"]

    def until(name, step):
        process = spawn(["-m", *arguments], cwd=ROOT)
        wait_for(folder / name, step, process)
        return process

    killed = until("lr=0.0003,strategy=ddp", 10)
    for number in (killed.pid, *processes_of(folder)):
        os.kill(number, signal.SIGKILL)
    killed.wait()
    time.sleep(2)  # the workers notice that their parent is gone
    first = {job["name"]: job["seconds"] for job in told(folder)["jobs"] if job["status"] == "finished"}
    assert len(first) == 2

    stopped = until("lr=0.001,strategy=fsdp", 10)
    stopped.terminate()
    out, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, out
    assert f"to resume: python -m pretrain -m {' '.join(arguments)}" in out
    assert told(folder)["status"] == "stopped"
    assert [job["status"] for job in told(folder)["jobs"]] == ["finished"] * 5 + ["stopped"] + ["waiting"] * 2

    code, out = run(spawn, arguments)
    assert code == 0, out
    made = told(folder)
    assert [job["status"] for job in made["jobs"]] == ["finished"] * 8
    assert {name: s for job in made["jobs"] if (name := job["name"]) in first and (s := job["seconds"])} == first
    starts = [len(started_at(folder / job["folder"])) for job in made["jobs"]]
    assert starts == [1, 1, 2, 1, 1, 2, 1, 1]
    assert all(read_records(folder / job["folder"] / "metrics.jsonl")[-1]["step"] == 60 for job in made["jobs"])
