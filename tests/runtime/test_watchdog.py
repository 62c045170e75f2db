"""A run that is stalled ends by itself, says where it is stalled, and leaves the stacks of all its threads."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.launch.test_launch import LONG, PAIR, steps, wait_for, workers_of
from tests.runs import ROOT, at_call, injected, starts

GUARDED = """
import sys, time
from pathlib import Path
from pretrain.runtime.watchdog import Watchdog
watchdog = Watchdog()
limits, tell = map(float, sys.argv[2:]), lambda place, how_long: print("at", place, flush=True)
with watchdog.guarding(*limits, log=Path(sys.argv[1]), report=tell):
{work}
print("ended well")
"""


def start(lines, log, *limits):
    """A process that does ``lines`` under a watchdog."""
    text = GUARDED.format(work="\n".join(f"    {line}" for line in lines))
    words = [sys.executable, "-c", text, log, *map(str, limits)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_process_that_was_stopped_for_long_goes_on(tmp_path):
    """Ctrl-Z and fg, a job that the cluster has suspended."""
    log = tmp_path / "rank-0.log"
    with start(["watchdog.heartbeat()", BEGINS, "time.sleep(0.5)"], log, 1.0, 60.0) as process:
        assert process.stdout.readline() == "begins\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "ended well\n"
    assert log.read_text() == ""


def test_stacks_on_demand(tmp_path):
    log = tmp_path / "rank-0.log"
    with start(["def busy():", f"    {BEGINS}", "    input()", "busy()"], log, 100.0, 100.0) as process:
        assert process.stdout.readline() == "begins\n"
        process.send_signal(signal.SIGUSR2)
        assert process.communicate("\n", timeout=30)[0] == "ended well\n"
    assert "in busy" in log.read_text()


STUCK = "def stuck(): time.sleep(60)"
BEGINS = "print('begins', flush=True)"
PROGRAMS = {  # what is done under a watchdog, and its limits
    "hang": ([STUCK, "watchdog.heartbeat()", "stuck()"], 1.0, 60.0),
    "moves": (["for _ in range(10): watchdog.heartbeat(); time.sleep(0.2)"], 1.0, 60.0),
    "before the first pat": (["time.sleep(2)"], 1.0, 60.0),
    "rests": (["watchdog.heartbeat()", "watchdog.allow_slow()", "time.sleep(2)"], 1.0, 60.0),
    "before the first pat for too long": ([STUCK, "stuck()"], 0.2, 1.5),
    "rests for too long": ([STUCK, "with watchdog.slow():", "    watchdog.heartbeat()", "    stuck()"], 0.2, 1.5),
    # an export in the middle of a run tells of what has been saved, and still takes its time
    "rests and pats": (
        ["with watchdog.slow():", "    watchdog.heartbeat()", "    time.sleep(2.5)", "time.sleep(0.2)"],
        1.0,
        60.0,
    ),
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Of each of ``PROGRAMS``: its process, and its log. They start together, because they do little but wait."""
    started = {}
    for name, (lines, *limits) in PROGRAMS.items():
        log = tmp_path_factory.mktemp("guarded") / "rank-0.log"
        started[name] = start(lines, log, *limits), log
    yield started
    for process, _ in started.values():
        process.kill()
        process.communicate()


def test_a_hang_ends_with_its_place_and_its_stacks(guarded):
    process, log = guarded["hang"]
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "stuck" in out
    assert "ended well" not in out
    assert "no progress for 1 s (launch.timeout)" in log.read_text()
    assert "in stuck" in log.read_text()


@pytest.mark.parametrize("name", ["moves", "before the first pat", "rests", "rests and pats"])
def test_what_is_no_hang(name, guarded):
    process, _ = guarded[name]
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "ended well\n")


@pytest.mark.parametrize("name", ["before the first pat for too long", "rests for too long"])
def test_what_rests_for_too_long_is_a_hang_too(name, guarded):
    process, log = guarded[name]
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, "stuck" in out) == (1, True)
    assert "no progress for 1.5 s (launch.slow_timeout)" in log.read_text()


def assert_stacks_of_both_ranks(run):
    for rank in (0, 1):
        assert "Thread 0x" in (run / f"logs/rank-{rank}.log").read_text()


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_found_and_the_group_comes_back(
    base_arguments, exact_model, spawn, command, tmp_path
):
    run = tmp_path / "run"
    given = [*base_arguments, f"model_name={exact_model('llama')}", *PAIR, "sink=jsonl", "max_steps=150"]
    given += ["evaluate_every=null", "save_every=10"]
    process = spawn([*given, f"output_dir={run}", "launch.timeout=8", "launch.max_restarts=1"])
    wait_for(lambda: steps(run) >= 25, process)
    workers_of(process.pid)[1].send_signal(signal.SIGSTOP)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert "rank 1 does not answer: no progress for 8 s (launch.timeout); rank 0 at " in out
    assert "(restart 1 of 1)" in out
    assert_stacks_of_both_ranks(run)
    assert not [p for p in psutil.process_iter() if p.status() == psutil.STATUS_STOPPED and p.ppid() == process.pid]
    facts = read_run_file(run)
    assert (facts["status"], facts["restarts"]) == ("finished", 1)
    [_, (step, resumed)] = starts(run)
    assert resumed
    assert step >= 10
    code, _, err = command([*given, f"output_dir={tmp_path / 'undisturbed'}"])
    assert code == 0, err
    ours, theirs = (
        [r for r in read_records(f / "metrics.jsonl") if r["event"] == "train"] for f in (run, tmp_path / "undisturbed")
    )
    assert [(r["step"], r["loss"]) for r in ours] == [(r["step"], r["loss"]) for r in theirs]
    ours, theirs = (load_file(f / "model/model.safetensors") for f in (run, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


SLOW = ["launch.timeout=4", "launch.slow_timeout=4"]


def assert_ended_in_slow_work(process, tmp_path):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "no progress for 4 s (launch.slow_timeout), so it ends" in out
    assert (tmp_path / "mark").exists()
    assert "sitecustomize.py" in (tmp_path / "run/logs/rank-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        "pretrain.strategy.engine:Engine.backward",
        "pretrain.training.trainer:Trainer.restore",
        "pretrain.models.hub.export:save_full",
    ],
)
def test_what_may_be_slow_has_an_end(where, base_arguments, spawn, command, tmp_path):
    """The first forward of a step, resuming, exporting; of an evaluation, below."""
    arguments = [*base_arguments, f"output_dir={tmp_path / 'run'}", *SLOW]
    if "restore" in where:
        assert command([*arguments, "max_steps=5"])[0] == 0
    assert_ended_in_slow_work(spawn(arguments, env=at_call(where, "hang", tmp_path / "mark")), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["pretrain.strategy.engine:InferenceEngine.forward", "pretrain.strategy.engine:Engine.backward"]
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_stands_still_in_its_first_forward(strategy, where, base_arguments, spawn, tmp_path):
    run = tmp_path / "run"
    arguments = [*base_arguments, f"strategy={strategy}", "devices=2", "batch_size=1", *SLOW, f"output_dir={run}"]
    process = spawn(arguments, env=at_call(where, "hang", tmp_path / "mark", rank="1"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "rank 1 is stalled: no progress for 4 s (launch.slow_timeout)" in out
    assert "rank 0 at " in out
    assert_stacks_of_both_ranks(run)


FROZEN = """
import os, time
real = os.fsync
def fsync(file):
    if "/checkpoints/" in os.readlink(f"/proc/self/fd/{file}") and os.environ.get("RANK") != "0":
        time.sleep(3600)
    real(file)
os.fsync = fsync
"""


SHARDED = ["strategy=fsdp", "devices=2", "batch_size=1"]


def assert_ended_in_a_save(process, run):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "launch.timeout" in out or "Timed out waiting" in out  # the watchdog's word, or that of the rank that waits
    assert not list((run / "checkpoints").glob("step-*[0-9]"))
    assert "fsync" in "".join(log.read_text() for log in (run / "logs").glob("rank-*.log"))


@pytest.mark.slow
def test_a_disk_that_hangs_during_a_save_of_two_ranks(base_arguments, spawn, tmp_path):
    """fsync never returns to one rank in its thread."""
    given = [*base_arguments, *SHARDED, f"output_dir={tmp_path / 'run'}", "launch.timeout=4"]
    began_at = time.monotonic()
    assert_ended_in_a_save(spawn(given, env=injected(tmp_path, FROZEN)), tmp_path / "run")
    assert time.monotonic() - began_at < 90


def test_runs_that_hang(base_arguments, spawn, tmp_path):
    """Three side by side, because they do little but wait: fsync never returns to the one that saves; to open what run.json
    is written through takes for ever, once the run has begun; the first forward of an evaluation has no end."""
    places = {name: tmp_path / name for name in ("save", "open", "forward")}
    for place in places.values():
        place.mkdir()
    begun = [*base_arguments, *LONG[:1], "evaluate_every=10", "save_every=20", "sink=jsonl", "launch.timeout=4"]
    opens = at_call("pretrain.runtime.files:open_new", "hang", places["open"] / "mark", at=3, paths="run.json")
    forward = at_call("pretrain.strategy.engine:InferenceEngine.forward", "hang", places["forward"] / "mark")
    processes = {
        name: spawn([*given, f"output_dir={places[name] / 'run'}"], env=environment)
        for name, given, environment in (
            ("save", [*base_arguments, "launch.timeout=4"], injected(places["save"], FROZEN)),
            ("open", begun, opens),
            ("forward", [*base_arguments, *SLOW], forward),
        )
    }
    assert_ended_in_a_save(processes["save"], places["save"] / "run")
    assert_ended_in_slow_work(processes["forward"], places["forward"])
    out, _ = processes["open"].communicate(timeout=120)
    assert processes["open"].returncode == 1, out
    assert "rank-0 is stalled at runtime/files.py" in out
    assert "no progress for 4 s (launch.timeout)" in out
    assert "write_json" in (places["open"] / "run/logs/rank-0.log").read_text()


def test_a_bug_in_one_ranks_saving_is_the_one_that_is_told(base_arguments, spawn, tmp_path):
    fault = "import os\nfrom pretrain.checkpoint.store import CheckpointStore\n"
    fault += "def prune(self): raise KeyError('on purpose')\nCheckpointStore._prune = prune\n"
    process = spawn([*base_arguments, *PAIR, f"output_dir={tmp_path / 'run'}"], env=injected(tmp_path, fault))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1, out
    assert "KeyError: 'on purpose'" in out
    assert "another rank" not in out
