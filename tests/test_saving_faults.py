"""What happens to the disk while a run saves: the last good checkpoint stays, the error says what and where, and the same
command goes on from it to the very run that was never disturbed."""

import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest

from pretrain.checkpoint.store import Store
from pretrain.telemetry.jsonl import read_records
from tests.runs import assert_same_run, wait_for

MIB = 1 << 20


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)


@contextmanager
def mounted(*arguments):
    """Something mounted on the last of ``arguments``, for a while."""
    done = mount(*arguments)
    if done.returncode:
        pytest.skip(f"needs mount(8), as root on Linux: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(arguments[-1])], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 40 MiB."""
    if os.geteuid():
        pytest.skip("only root may mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=40m", "tmpfs", folder):
        yield folder


def test_a_disk_without_room(uninterrupted, base_arguments, command, small_disk):
    """Training goes on without checkpoints; only the last one can't be missed."""
    run, ballast = small_disk / "run", small_disk / "ballast"
    ballast.write_bytes(bytes(30 * MIB))
    arguments = [*base_arguments, f"output_dir={run}"]
    code, _, err = command(arguments)
    assert code == 2
    assert err.count("the run goes on") == 3, "at steps 5, 10 and 15"
    last = [line for line in err.splitlines() if line.startswith("error:")][-1]
    assert "step-00000020 could not be written: it needs 0.00 GiB" in last
    assert "there is none before it" in last
    assert "Traceback" not in err
    assert [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"] == list(range(1, 21))
    ballast.unlink()
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_run(run, uninterrupted)


def test_a_disk_that_fills_up_during_a_save(uninterrupted, base_arguments, command, small_disk, monkeypatch):
    """There was room when it was asked for (others write too): the error comes from the writing itself."""
    run, ballast = small_disk / "run", small_disk / "ballast"
    (run / "logs").mkdir(parents=True)
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(MIB)):
            pass
    os.truncate(ballast, ballast.stat().st_size - MIB // 4)  # records have room, a checkpoint has not
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    arguments = [*base_arguments, f"output_dir={run}"]
    code, _, err = command(arguments)
    assert code == 2
    assert [err.count(f"step-000000{step:02} could not be written") for step in (5, 10, 15, 20)] == [1, 1, 1, 1], err
    assert "step-00000020 could not be written" in err.splitlines()[-1]
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    ballast.unlink()
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_run(run, uninterrupted)


def test_a_disk_that_turns_read_only(uninterrupted, base_arguments, command, spawn, tmp_path):
    if os.geteuid():
        pytest.skip("only root may make a folder read-only for itself")
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}"]
    checkpoints = run / "checkpoints"
    process = spawn([*arguments, "max_steps=100000", "scheduler=constant", "warmup_proportion=0"])
    while Store(checkpoints).newest() is None and process.poll() is None:
        time.sleep(0.005)
    with mounted("--bind", checkpoints, checkpoints):
        assert not mount("-o", "remount,ro,bind", checkpoints).returncode
        out, _ = process.communicate(timeout=60)
        good = Store(checkpoints).newest()
    assert process.returncode == 2, out
    said = [line for line in out.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "could not be written" in said[0]
    assert "Read-only file system" in said[0]
    assert f"the last good one is {good}" in said[0]
    ended_at = read_records(run / "metrics.jsonl")[-1]["step"]
    assert ended_at < int(good.name[5:]) + 15, "not silently: soon after the save that failed"
    code, _, err = command(
        [*arguments, f"max_steps={ended_at + 5}", "scheduler=constant", "warmup_proportion=0"],
    )
    assert code == 0, err
    steps = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    assert steps == list(range(1, ended_at + 6))


def test_a_folder_that_is_removed(uninterrupted, base_arguments, spawn, tmp_path):
    """It is made again; only what lay in it is lost."""
    run = tmp_path / "run"
    process = spawn([*base_arguments, f"output_dir={run}"])
    wait_for(run, 6, process)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    out, _ = process.communicate(timeout=60)
    if process.returncode == 2:  # in the very middle of a save
        assert "could not be written" in out
        return
    assert process.returncode == 0, out
    assert_same_run(run, uninterrupted)
