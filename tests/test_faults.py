"""Faults of the world around a run: files of the data that change, full disks, clocks that jump, stale locks."""

import os
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from pretrain.data.cache import cache_dir
from pretrain.data.changed_files import FilesWatch, differing
from pretrain.data.reading.opening import stamp_of
from pretrain.data.store.token_shards import _mapped, open_part
from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import Evaluated, RunFinished, RunStarted
from pretrain.telemetry.monitor import Monitor
from pretrain.telemetry.run_file import RunFile, read_run_file
from pretrain.telemetry.sinks.jsonl import Jsonl, read_records
from tests.launch.test_launch import PAIR, steps, wait_for
from tests.runs import assert_same_numbers, injected
from tests.telemetry.test_monitor import step_done
from tests.test_stopping import stopping

# -- the data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_corpus(corpus, tmp_path):
    """A copy that may be changed; and another cache, so that no other test's tokens are touched."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


@pytest.fixture
def on_own_corpus(base_arguments, own_corpus, tmp_path):
    return [*base_arguments, f"dataset.nameOrPath={own_corpus}", f"output_dir={tmp_path / 'run'}", "sink=jsonl"]


def test_a_resumed_run_names_the_files_that_are_others(on_own_corpus, own_corpus, command, tmp_path):
    assert command([*on_own_corpus, "max_steps=5"])[0] == 0
    os.utime(own_corpus / "03.txt")  # only touched
    code, _, err = command([*on_own_corpus, "max_steps=6"])
    assert code == 0, err
    (own_corpus / "05.txt").write_text("Another text altogether. " * 50)
    (own_corpus / "07.txt").unlink()
    (own_corpus / "new.txt").write_text("A text that was not there. " * 50)
    code, _, err = command([*on_own_corpus, "max_steps=7"])
    assert code == 2, err
    found = f"{own_corpus}/05.txt changed, {own_corpus}/07.txt is gone, {own_corpus}/new.txt is new"
    assert f"the data has changed since the run started: {found}" in err
    assert "03.txt" not in err


def test_a_run_says_once_which_files_changed_under_it(on_own_corpus, own_corpus, spawn, tmp_path):
    more = ["max_steps=100", "save_every=10", "evaluate_every=null"]
    process = spawn([*on_own_corpus, *more])
    wait_for(lambda: steps(tmp_path / "run") >= 3, process)
    (own_corpus / "05.txt").write_text("Another text altogether. " * 50)
    (own_corpus / "07.txt").unlink()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    said = [line for line in out.splitlines() if line.startswith("data: ")]
    assert len(said) == 1
    assert f"{own_corpus}/05.txt changed, {own_corpus}/07.txt is gone since this run read it" in said[0]


def test_the_watch_is_quiet_about_what_stays_and_names_a_few_of_many(tmp_path, capsys):
    files = {}
    for i in range(9):
        (tmp_path / f"{i}").write_text("text")
        files[str(tmp_path / f"{i}")] = (stamp_of(tmp_path / f"{i}"), "digest")
    watch = FilesWatch(files)
    for event in (Evaluated(1, (), 0.0), RunFinished(1, "finished", 1)):
        watch(event)
    assert capsys.readouterr().err == ""
    for i in range(8):
        (tmp_path / f"{i}").unlink()
    for event in (Evaluated(2, (), 0.0), RunFinished(2, "finished", 1), Evaluated(2, (), 0.0)):
        watch(event)
    err = capsys.readouterr().err
    assert err.count("is gone") == 5
    assert err.count("and 3 more files") == 1


def test_a_run_of_an_earlier_version_has_nothing_to_compare_with():
    assert differing({}, {"a": ((1, 1, 1), "x")}) == ""


def test_tokens_that_vanish_from_the_cache_are_made_anew(on_own_corpus, command, monkeypatch, tmp_path):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    assert command([*on_own_corpus, "max_steps=5"])[0] == 0
    parts = sorted((cache_dir() / "parts").rglob("*.*"))
    assert parts
    for i, part in enumerate(p for p in parts if p.is_file()):
        if i % 2:
            part.unlink()
        else:
            os.truncate(part, part.stat().st_size // 2)
    _mapped.cache_clear()  # the next process would have none
    code, _, err = command([*on_own_corpus, "max_steps=8"])
    assert code == 0, err
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "other_cache"))
    whole = [a for a in on_own_corpus if not a.startswith("output_dir")]
    code, _, err = command([*whole, "max_steps=5", f"output_dir={tmp_path / 'whole'}"])
    code, _, err = command([*whole, "max_steps=8", f"output_dir={tmp_path / 'whole'}"])
    assert code == 0, err
    losses = [
        [r["loss"] for r in read_records(tmp_path / name / "metrics.jsonl") if r["event"] == "train"]
        for name in ("run", "whole")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("left", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 100))])
def test_tokens_that_vanish_under_a_run_are_named(left, corpus, base_arguments, monkeypatch, tmp_path, command):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    assert command([*base_arguments, "task=tokenization", f"output_dir={tmp_path / 'run'}"])[0] == 0
    path = max((p for p in (cache_dir() / "parts").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    part = open_part(path)
    _mapped.cache_clear()
    if left is None:
        path.unlink()
    else:
        os.truncate(path, left)
    with pytest.raises(UserError, match=f"{path} has disappeared from the token cache"):
        _ = part.tokens


# -- disks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(size)``: a real file system of that size."""
    mounted = []

    def make(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("only root may mount a small disk")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=False)


@pytest.mark.parametrize("more", [[], pytest.param(PAIR, marks=pytest.mark.slow)], ids=["single", "pair"])
def test_a_disk_that_is_full_from_the_start(more, base_arguments, spawn, small_disk):
    disk = small_disk("32k")
    (disk / "run").mkdir()
    with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    process = spawn([*base_arguments, *more, f"output_dir={disk / 'run'}"])
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    assert f"error: output_dir={disk / 'run'}: can't be written: No space left on device" in out
    assert "Traceback" not in out
    assert "Logging error" not in out


def test_a_disk_that_fills_up_under_a_run(base_arguments, spawn, small_disk):
    """Records and log have no room any more: said once each, and the run continues until it has to save."""
    disk = small_disk("4m")
    run = disk / "run"
    process = spawn([*base_arguments, f"output_dir={run}", "max_steps=300", "save_every=300", "evaluate_every=50"])
    wait_for(lambda: steps(run) >= 3, process)
    with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2, out
    assert (
        out.count("metrics.jsonl can't be written: No space left on device; its records are kept and written later")
        == 1
    )
    assert out.count("run.json can't be written: No space left on device; the run continues") == 1
    assert "step 299/300" in out
    assert "Traceback" not in out
    assert "Exception ignored" not in out


def test_run_json_on_a_full_disk(tmp_path, capsys, monkeypatch):
    listener = RunFile(tmp_path)
    full = partial(Path.open, Path("/dev/full"))
    monkeypatch.setattr("pretrain.runtime.files.open_new", lambda path, **options: full(**options))
    for event in (RunStarted(0, total_steps=2, resumed=False), Evaluated(0, (), 0.0), RunFinished(2, "finished", 20)):
        listener(event)
    assert capsys.readouterr().err.count("run.json can't be written: No space left on device; the run continues") == 1
    monkeypatch.undo()
    listener(RunFinished(2, "finished", 20))
    assert read_run_file(tmp_path)["status"] == "finished"


# -- clocks -------------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_no_duration(tmp_path, monkeypatch):
    """The wall clock goes to 2001 and back by a day with every look at it."""
    looks = iter(1e9 + (-1) ** i * 86_400 for i in range(10**6))
    monkeypatch.setattr(time, "time", lambda: next(looks))
    listeners = [Monitor({"jsonl": Jsonl()}, run=tmp_path, log_every=1), RunFile(tmp_path)]
    for event in (
        RunStarted(0, total_steps=2, resumed=False),
        step_done(1),
        step_done(2),
        RunFinished(2, "finished", 20),
    ):
        for listener in listeners:
            listener(event)
    trained = [r for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "train"]
    assert all(0 <= r["step_seconds"] < 3600 for r in trained)
    assert 0 <= read_run_file(tmp_path)["seconds"] < 3600


JUMPING = """
import itertools, time
real, looks = time.time, itertools.count()
time.time = lambda: real() + (-1) ** next(looks) * 5 * 3600
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], PAIR], ids=["single", "pair"])
def test_a_clock_that_jumps_under_a_run(more, base_arguments, command, spawn, tmp_path):
    """Five hours ahead and back with every look at it, over a stop and a resume."""
    run, whole, environment = tmp_path / "run", tmp_path / "whole", injected(tmp_path, JUMPING)
    for expected in (75, 0):
        process = spawn([*base_arguments, *more, *stopping("train", 8), f"output_dir={run}"], env=environment)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == expected, out
    assert command([*base_arguments, *more, f"output_dir={whole}"])[0] == 0
    assert_same_numbers(run, whole)
    trained = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    assert all(0 < r["goodput"] <= 1 for r in trained[1:7])
    assert all(r["goodput"] is None or 0 <= r["goodput"] <= 1 for r in trained)
    assert all(0 <= (r["eta_seconds"] or 0) < 3600 for r in trained)
    assert all(0 <= r["step_seconds"] < 3600 for r in trained)
    assert 0 <= read_run_file(run)["seconds"] < 3600


# -- locks --------------------------------------------------------------------------------------------------------------


def test_a_stale_lock_is_taken_over(base_arguments, command, tmp_path):
    """As a run leaves it that was killed: the file is there, with the pid of a process that is not."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / ".lock").write_text(f"{socket.gethostname()} {process.pid}\n")
    code, _, err = command([*base_arguments, f"output_dir={tmp_path}", "max_steps=1"])
    assert code == 0, err


@pytest.mark.slow
def test_a_folder_at_work_names_who_works_in_it(base_arguments, spawn, command, tmp_path):
    arguments = [*base_arguments, *PAIR, f"output_dir={tmp_path}", "max_steps=100000", "sink=jsonl"]
    process = spawn(arguments)
    wait_for(lambda: steps(tmp_path) >= 2, process)
    host, pid = (tmp_path / ".lock").read_text().split()
    assert host == os.uname().nodename
    assert os.path.exists(f"/proc/{pid}") or sys.platform == "darwin"
    code, _, err = command(arguments)
    assert code == 2
    assert f"another run is using it (host and pid: {host} {pid})" in err
    assert process.poll() is None
