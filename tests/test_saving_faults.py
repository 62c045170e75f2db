"""What happens to the disk while a run saves: the last good checkpoint stays, the error says what and where, and the same
command resumes from it to the very run that was never disturbed."""

import ctypes
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pytest

from pretrain.checkpoint.store import CheckpointStore
from pretrain.telemetry.sinks.jsonl import read_records
from tests.runs import assert_same_checkpoint, assert_same_run, injected, numbers, wait_for

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
    """Training continues without checkpoints; only the last one can't be missed."""
    run, ballast = small_disk / "run", small_disk / "ballast"
    ballast.write_bytes(bytes(30 * MIB))
    arguments = [*base_arguments, f"output_dir={run}"]
    code, _, err = command(arguments)
    assert code == 2
    assert err.count("the run continues") == 3, "at steps 5, 10 and 15"
    last = [line for line in err.splitlines() if line.startswith("error:")][-1]
    assert "step-00000020 could not be written: it needs 0.00 GiB" in last
    assert "there is no earlier checkpoint" in last
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
    while CheckpointStore(checkpoints).newest() is None and process.poll() is None:
        time.sleep(0.005)
    with mounted("--bind", checkpoints, checkpoints):
        assert not mount("-o", "remount,ro,bind", checkpoints).returncode
        out, _ = process.communicate(timeout=60)
        good = CheckpointStore(checkpoints).newest()
    assert process.returncode == 2, out
    said = [line for line in out.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "could not be written" in said[0]
    assert "Read-only file system" in said[0]
    assert f"the last valid checkpoint is {good}" in said[0]
    ended_at = read_records(run / "metrics.jsonl")[-1]["step"]
    assert ended_at < int(good.name[5:]) + 15, "not silently: soon after the save that failed"
    code, _, err = command(
        [*arguments, f"max_steps={ended_at + 5}", "scheduler=constant", "warmup_proportion=0"],
    )
    assert code == 0, err
    steps = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    assert steps == list(range(1, ended_at + 6))


WHILE_FLUSHING = """
import ctypes, errno, os, shutil
real = os.fsync
def fsync(file):
    path = os.readlink(f"/proc/self/fd/{{file}}")
    if path.endswith("{path}"):
        {action}
    real(file)
os.fsync = fsync
"""
SECOND = "/step-00000010.partial"


def like_anybody():
    """Root's right to write everywhere is given up by the process that is about to begin."""
    if not os.geteuid():
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize(
    ("action", "says", "left"),
    [
        (
            "os.chmod('{run}/checkpoints', 0o500)",
            "Permission denied",
            "the last valid checkpoint is {run}/checkpoints/step-00000005",
        ),
        *(
            pytest.param(f"shutil.rmtree('{{run}}{below}')", "No such file or directory", left, marks=pytest.mark.slow)
            for below, left in [
                (f"/checkpoints{SECOND}", "the last valid checkpoint is {run}/checkpoints/step-00000005"),
                ("/checkpoints", "there is no earlier checkpoint"),
                ("", "there is no earlier checkpoint"),
            ]
        ),
    ],
    ids=["permission lost", "its folder removed", "checkpoints removed", "the run removed"],
)
def test_in_the_very_middle_of_a_save(action, says, left, uninterrupted, base_arguments, command, spawn, tmp_path):
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}"]
    fault = WHILE_FLUSHING.format(path=f"{SECOND}/optimizer.safetensors", action=action.format(run=run))
    process = spawn(arguments, env=injected(tmp_path, fault), preexec_fn=like_anybody)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    (error,) = [line for line in out.splitlines() if line.startswith("error:")]
    for words in (f"{run}/checkpoints/step-00000010 could not be written", says, left.format(run=run)):
        assert words in error
    assert "Traceback" not in out
    if (run / "checkpoints").exists():
        assert CheckpointStore(run / "checkpoints").complete_steps() == [5]
        (run / "checkpoints").chmod(0o700)
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_the_whole_run_removed_between_two_saves(uninterrupted, base_arguments, command, spawn, tmp_path):
    """Training continues and is saved again. What lay in the folder is lost, and it is said that records are."""
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}"]
    remove = f"os.path.exists('{run}/checkpoints/step-00000005') and shutil.rmtree('{run}')"
    fault = WHILE_FLUSHING.format(path="/run/checkpoints", action=remove)  # the last that is flushed of a save
    process = spawn(arguments, env=injected(tmp_path, fault))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert f"{run}/run.json can't be written: No such file or directory; the run continues" in out
    assert_same_checkpoint(run, uninterrupted)
    for known in (False, True):  # the records of its end were lost too: first it is told again
        code, _, err = command(arguments)
        assert code == 0, err
        assert ("is finished: 20 steps" in err) == known
    assert numbers(run)[-1]["event"] == "run_finished"


@pytest.mark.slow
def test_one_rank_that_cannot_write(base_arguments, spawn, command, tmp_path):
    """Full: the run continues without this checkpoint, on all ranks. Anything else ends it, with the error of that rank."""
    pair = [*base_arguments, "strategy=fsdp", "devices=2", "batch_size=1"]
    whole, shard = tmp_path / "whole", f"{SECOND}/model.rank-1.safetensors"
    code, _, err = command([*pair, f"output_dir={whole}"])
    assert code == 0, err
    for name, says in (("ENOSPC", "No space left on device"), ("EIO", "Input/output error")):
        folder = tmp_path / name
        folder.mkdir()
        run = folder / "run"
        fault = WHILE_FLUSHING.format(
            path=shard, action=f"raise OSError(errno.{name}, os.strerror(errno.{name}), path)"
        )
        process = spawn([*pair, f"output_dir={run}", "checkpoint.keep_last=null"], env=injected(folder, fault))
        out, _ = process.communicate(timeout=120)
        (error,) = [line for line in out.splitlines() if line.startswith("error:")]
        good = run / "checkpoints/step-00000005"
        for words in ("step-00000010 could not be written", says, shard, f"the last valid checkpoint is {good}"):
            assert words in error
        assert "Traceback" not in out
        goes_on = name == "ENOSPC"
        assert error.endswith("; the run continues") == goes_on
        assert process.returncode == (0 if goes_on else 2), out
        assert CheckpointStore(run / "checkpoints").steps() == ([5, 15, 20] if goes_on else [5])
        code, _, err = command([*pair, f"output_dir={run}", "checkpoint.keep_last=null"])
        assert code == 0, err
        assert_same_run(run, whole)


SLOW_DISK = """
import io, os, time
real_sync, real_open = os.fsync, io.open
def fsync(file):
    if "/checkpoints" in os.readlink(f"/proc/self/fd/{file}"):
        time.sleep(0.8)
    real_sync(file)
def open(file, mode="r", *more, **given):
    if "w" in mode and "/checkpoints/" in str(file):
        time.sleep(0.8)
    return real_open(file, mode, *more, **given)
os.fsync, io.open = fsync, open
"""


@pytest.mark.slow
def test_a_slow_disk(uninterrupted, base_arguments, spawn, tmp_path):
    """Every file takes its time, and all of them more than launch.timeout: nobody calls it a hang. Until the next save is
    due training continues."""
    run = tmp_path / "run"
    process = spawn(
        [*base_arguments, f"output_dir={run}", "save_every=10", "launch.timeout=6"],
        env=injected(tmp_path, SLOW_DISK),
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert "is stalled" not in out
    records = [(r["event"], r["step"]) for r in read_records(run / "metrics.jsonl")]
    assert records.index(("train", 19)) < records.index(("checkpoint", 10)), "it was written while training went on"
    (saved,) = [r for r in read_records(run / "metrics.jsonl") if (r["event"], r["step"]) == ("checkpoint", 10)]
    assert saved["seconds"] > 4
    assert_same_run(run, uninterrupted)


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
