"""hydra/launcher=slurm: with submitit's local executor everywhere, and on a real SLURM of two nodes where one can run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pretrain.sweep.job import job_of
from pretrain.sweep.launchers.slurm import SlurmJob
from tests.data.texts import parts_of, some_text

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slurm
TWO_NODES = ["hydra.launcher.nodes=2", "hydra.launcher.cpus_per_task=1", "hydra.launcher.gpus_per_node=0"]
SIMPLE = ["evaluate_every=null", "save_every=null", "sink=jsonl"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM with the nodes n1 and n2; everything started in this process's environment finds it."""
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", str(ROOT / "scripts/slurm_local.sh")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_LOCAL_PORT", str(17_000 + os.getpid() % 5000 * 3))  # beside one that is already there
        started = subprocess.run([*script, "start", folder], capture_output=True, text=True, check=False)
        if started.returncode == 2:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        patch.setenv(*started.stdout.removeprefix("export ").strip().split("="))
        yield folder
        subprocess.run([*script, "stop", folder], check=True)


@pytest.fixture
def sweep(base_arguments, spawn, tmp_path):
    """Start a sweep through the launcher, with its folder below ``tmp_path``."""

    def start(*arguments, folder=tmp_path):
        place = f"hydra.sweep.dir={folder / 'sweep'}"
        return spawn(["-m", "hydra/launcher=slurm", *base_arguments, *SIMPLE, place, *arguments], cwd=ROOT)

    return start


def finish(process, code=0):
    out, _ = process.communicate(timeout=240)
    assert process.returncode == code, out
    return out


def runs(tmp_path):
    """The run.json of every job."""
    return [json.loads(file.read_text()) for file in sorted((tmp_path / "sweep").glob("*/run.json"))]


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in map(json.loads, lines) if r["event"] == "train"}


def wait_for_steps(tmp_path, steps, *, jobs=1):
    """Until the runs of that many jobs have trained that far; the first one's folder."""
    for _ in range(1200):
        files = sorted((tmp_path / "sweep").glob("*/metrics.jsonl"))
        there = [file.parent for file in files if len(records(file.parent)) >= steps]
        if len(there) == jobs:
            return there[0]
        time.sleep(0.1)
    raise AssertionError("the job has not started")


def undisturbed(base_arguments, spawn, folder, *arguments):
    finish(spawn([*base_arguments, *SIMPLE, f"output_dir={folder}", *arguments]))
    return records(folder)


@pytest.mark.slow
def test_sweep_in_local_processes_survives_the_warning_signal(sweep, base_arguments, spawn, tmp_path):
    process = sweep("hydra.launcher.cluster=local", "max_steps=300", "devices=1,2")
    folder = wait_for_steps(tmp_path, 10)
    controllers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for controller in controllers:
        for task in Path(f"/proc/{controller}/task/{controller}/children").read_text().split():
            os.kill(int(task), signal.SIGUSR2)
    out = finish(process, code=2)  # of the job that can't have its devices
    assert "exit code 2" in out
    assert "failed: devices=2: strategy=single is one process" in out
    [run] = runs(tmp_path)
    assert (run["status"], run["restarts"]) == ("finished", 1)
    assert records(folder) == undisturbed(base_arguments, spawn, tmp_path / "alone", "max_steps=300")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, None], ids=["as they start", "as they train"])
def test_a_stop_ends_the_jobs_of_this_machine(delay, sweep, base_arguments, spawn, tmp_path):
    """Nobody would know of them any more; SLURM's stay in its queue."""
    words = ["hydra.launcher.cluster=local", "lr=1e-3,2e-3"]
    process = sweep(*words, "max_steps=100000")
    if delay is None:
        wait_for_steps(tmp_path, 5, jobs=2)
    else:
        while not list(tmp_path.glob("sweep/.submitit/*/*_log.out")):
            time.sleep(0.01)
    jobs = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    out = finish(process, code=75)
    assert not psutil.wait_procs(jobs, timeout=10)[1]
    states = [json.loads(file.read_text()) for file in sorted((tmp_path / "sweep").glob("*/job.json"))]
    assert [(state["status"], state["exit_code"]) for state in states] == [("stopped", 75)] * 2, out
    if delay is None:
        for job in tmp_path.glob("sweep/lr=*"):
            run = json.loads((job / "run.json").read_text())
            assert (run["status"], run["steps"] >= 5) == ("stopped", True)
            assert (job / f"checkpoints/step-{run['steps']:08d}/COMPLETE.json").exists()


@pytest.mark.parametrize(
    ("on_signal", "queued_again"),
    [
        ("signal.SIG_DFL", True),  # a command that is still importing, or has nothing left to do but to end
        ("lambda *_: sys.exit(75)", True),
        ("lambda *_: sys.exit(1)", False),
    ],
)
def test_job_is_queued_again_unless_saving_failed(on_signal, queued_again, monkeypatch, tmp_path):
    """As in SLURM: the warning comes as a signal while the job waits for its command."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    lines = f"signal.signal(signal.SIGTERM, {on_signal}); open('started', 'w'); time.sleep(60)"
    job = SlurmJob([sys.executable, "-c", f"import signal, sys, time; {lines}"], tmp_path)
    answers = []

    def warned(number, frame):
        if (tmp_path / "started").exists() and not answers:
            answers.append(job.checkpoint())

    earlier = signal.signal(signal.SIGALRM, warned)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    code = job()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, earlier)
    assert [answer is not None for answer in answers] == [queued_again]
    assert (code, at_exit) == ((75, []) if queued_again else (1, [(os._exit, 1)]))


@pytest.mark.parametrize(("rank", "status"), [("0", "running"), ("1", "waiting")])
def test_one_node_speaks_for_all(rank, status, monkeypatch, tmp_path):
    """The nodes of a job would else rewrite its job.json all at once."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_GLOBALID", rank)
    of = job_of(tmp_path, ["lr=1"], ("lr",))
    assert SlurmJob([sys.executable, "-c", ""], tmp_path, of)() == 0
    assert of.read()["status"] == status


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("hydra.launcher.nodes=0", "hydra.launcher.nodes=0: input should be greater than 0"),
        ("hydra.launcher.nodes=2", "hydra.launcher.nodes=2: cluster=local runs on one node"),
        ("hydra.launcher.gpus=2", "hydra.launcher.gpus"),
    ],
)
def test_a_mistake_is_one_line(sweep, argument, reason):
    out = finish(sweep("hydra.launcher.cluster=local", argument), code=2)
    assert reason in out
    assert "Traceback" not in out


def test_jobs_of_a_cluster(cluster, sweep, tmp_path):
    """A sweep of two, of which one fails, a run of two nodes, and one that sbatch refuses: at the same time, because they wait
    for SLURM."""
    folders = {name: tmp_path / name for name in ("two", "nodes", "refused")}
    short = ["max_steps=3", "checkpoint.export=never"]
    two = sweep("devices=1,2", *short, folder=folders["two"])
    nodes = sweep("hydra.launcher.nodes=2", "strategy=ddp", "devices=1", *short, folder=folders["nodes"])
    refused = sweep("hydra.launcher.partition=elsewhere", folder=folders["refused"])
    out = finish(refused, code=2)
    assert "invalid partition specified: elsewhere" in out
    assert "Traceback" not in out
    out = finish(two, code=2)
    assert [run["status"] for run in runs(folders["two"])] == ["finished"], out
    assert out.count(": done") == 1
    assert "failed: devices=2: strategy=single is one process" in out
    finish(nodes)
    [run] = runs(folders["nodes"])
    assert (run["status"], run["world_size"]) == ("finished", 2)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_preempted_job_saves_is_queued_again_and_goes_on(nodes, cluster, sweep, base_arguments, spawn, tmp_path):
    given = ["max_steps=300", *(["strategy=ddp", "batch_size=1"] if nodes > 1 else [])]
    process = sweep(*given, f"hydra.launcher.nodes={nodes}", "devices=1")
    folder = wait_for_steps(tmp_path, 10)
    job = subprocess.check_output(["squeue", "--noheader", "--format=%i"], text=True).strip()
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    finish(process)
    [run] = runs(tmp_path)
    assert (run["status"], run["restarts"]) == ("finished", 1)
    assert run["world_size"] == nodes
    assert "Restarts=1" in subprocess.check_output(["scontrol", "show", "job", job], text=True)
    assert records(folder) == undisturbed(base_arguments, spawn, tmp_path / "alone", *given, f"devices={nodes}")


@pytest.mark.slow
def test_leaving_the_wait_leaves_the_job(cluster, sweep, tmp_path):
    process = sweep("max_steps=100000")
    wait_for_steps(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    out = finish(process, code=75)
    job = subprocess.check_output(["squeue", "--noheader", "--format=%i"], text=True).strip()
    assert f"scancel {job}" in out
    subprocess.run(["scancel", job], check=True)
    for _ in range(300):
        if runs(tmp_path)[0]["status"] == "stopped":
            return
        time.sleep(0.1)
    raise AssertionError("scancel let the run save nothing")


@pytest.mark.slow
def test_two_nodes_tokenize_one_dataset(cluster, sweep, base_arguments, spawn, tmp_path, monkeypatch):
    """The cache is the same to the byte as that of one process, and both nodes have the whole dataset at the end."""
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / f"texts/{number}.txt").write_text(some_text(number, 200_000))
    words = ["task=tokenization", "dataset=local", f"dataset.nameOrPath={tmp_path / 'texts'}"]
    parts = []
    for name, start in (
        ("alone", lambda: spawn([*base_arguments, *words])),
        ("nodes", lambda: sweep(*TWO_NODES, *words)),
    ):
        monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / name))
        finish(start())
        parts.append(parts_of(tmp_path / name))
    assert parts[0] == parts[1]
    assert len(parts[0]) >= 8
    logs = [log.read_text() for log in (tmp_path / "sweep").glob(".submitit/*/*_log.out")]
    assert [log.count("training: ") for log in logs] == [1, 1]
    assert not list((tmp_path / "nodes/progress").glob("*"))
