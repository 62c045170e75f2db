"""Signals while a checkpoint is being written: it becomes whole or never counts, and the same command resumes."""

import os
import signal
import time

import psutil
import pytest

from pretrain.checkpoint.store import CheckpointStore
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.launch.test_launch import ended, wait_for
from tests.runs import assert_same_numbers, injected
from tests.runtime.test_watchdog import SHARDED

SLOW_DISK = """
import os, time
from pathlib import Path
real = os.fsync
def fsync(file):
    path = Path(os.readlink(f"/proc/self/fd/{file}"))
    if ".partial" in str(path):
        time.sleep(%s)
    real(file)
os.fsync = fsync
"""
STUCK_AFTER_ONE = "3600 if list(path.parents[1].glob('step-*[0-9]')) else 0"
BOTH = pytest.mark.parametrize(
    "more", [[], pytest.param(SHARDED, marks=pytest.mark.slow)], ids=["single", "sharded pair"]
)


@pytest.fixture
def undisturbed(uninterrupted, base_arguments, command, tmp_path):
    """``undisturbed(more)``: the run that nothing happens to."""

    def make(more):
        if not more:
            return uninterrupted
        code, _, err = command([*base_arguments, *more, f"output_dir={tmp_path / 'undisturbed'}"])
        assert code == 0, err
        return tmp_path / "undisturbed"

    return make


def being_written(run):
    return list((run / "checkpoints").glob("step-*.partial"))


@BOTH
@pytest.mark.parametrize("behind", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["behind", "blocking"])
def test_a_stop_during_a_save(behind, more, base_arguments, undisturbed, spawn, command, tmp_path):
    run = tmp_path / "run"
    arguments = [*base_arguments, *more, f"checkpoint.async={behind}", f"output_dir={run}"]
    process = spawn(arguments, env=injected(tmp_path, SLOW_DISK % 0.1), start_new_session=True)
    wait_for(lambda: being_written(run), process)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "Traceback" not in out
    saved = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "checkpoint"]
    assert saved[0] == 5, "it became whole"
    assert saved[-1] == read_run_file(run)["steps"] < 20
    assert sorted(set(saved)) == saved, "each once"
    assert CheckpointStore(run / "checkpoints").complete_steps() == saved[-2:]
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_numbers(run, undisturbed(more))


@BOTH
def test_a_second_ctrl_c_during_a_save(more, base_arguments, undisturbed, spawn, command, tmp_path):
    """The disk hangs once there is a whole checkpoint, so that no save can end before the second one."""
    run = tmp_path / "run"
    arguments = [*base_arguments, *more, f"output_dir={run}"]
    process = spawn(arguments, env=injected(tmp_path, SLOW_DISK % STUCK_AFTER_ONE), start_new_session=True)
    wait_for(lambda: CheckpointStore(run / "checkpoints").complete_steps() == [5] and being_written(run), process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.1)
    assert process.poll() is None, "it tries to save"
    os.killpg(process.pid, signal.SIGINT)
    out = ended(process, everyone)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    code, _, err = command(arguments)
    assert code == 0, err
    assert [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "run_started"] == [0, 5]
    assert_same_numbers(run, undisturbed(more))
