"""One process at a time, also where the file system has no locks, and its holder is dead."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pretrain.runtime import locks
from pretrain.runtime.locks import Busy, Lock

HOLD = """
import fcntl, sys, time
from pathlib import Path
if sys.argv[2] != "0":
    def flock(*_):
        raise OSError(int(sys.argv[2]), "no locks here")
    fcntl.flock = flock
from pretrain.runtime.locks import Lock
held = Lock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(3600)
"""
NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture
def without(monkeypatch):
    def refuse(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        if number:
            monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    started = []

    def start(number):
        words = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), str(number)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [0, *NO_LOCKS], ids=lambda n: errno.errorcode.get(n, "flock"))
def test_one_holder_until_it_lets_go_or_is_killed(number, holder, without, tmp_path):
    process = holder(number)
    without(number)
    lock = Lock(tmp_path / "lock")
    with pytest.raises(Busy):
        lock.acquire(timeout=0.05)
    process.send_signal(signal.SIGSTOP)  # suspended, not dead
    with pytest.raises(Busy):
        lock.acquire(timeout=0.05)
    process.kill()
    process.wait()
    assert lock.acquire(timeout=5) is lock
    with pytest.raises(Busy):
        Lock(tmp_path / "lock").acquire(timeout=0)
    lock.release()
    Lock(tmp_path / "lock").acquire(timeout=0).release()
    assert not (tmp_path / "lock.held").exists()


def test_it_is_of_the_file_that_has_the_name(monkeypatch, tmp_path):
    """The holder of a run's folder moves it aside and locks a new one, while another process is about to lock the old."""
    real, (folder, aside) = fcntl.flock, (tmp_path / "run", tmp_path / "run.old-1")
    folder.mkdir()
    new = Lock(folder / "lock")

    def late(file, how):
        monkeypatch.setattr(fcntl, "flock", real)
        folder.rename(aside)
        folder.mkdir()
        new.acquire(timeout=0)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(Busy):
        Lock(folder / "lock").acquire(timeout=0.1)
    new.release()
    Lock(folder / "lock").acquire(timeout=0).release()


def test_a_claim_that_could_not_be_written_claims_nothing(without, monkeypatch, tmp_path):
    without(errno.ENOSYS)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        with pytest.raises(OSError, match="No space"):
            Lock(tmp_path / "lock").acquire(timeout=0)
    Lock(tmp_path / "lock").acquire(timeout=0).release()


def test_a_child_that_was_given_it_still_holds_it(tmp_path):
    lock = Lock(tmp_path / "lock").acquire()
    child = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=lock.descriptors, stdin=subprocess.PIPE)
    lock.release()
    with pytest.raises(Busy):
        Lock(tmp_path / "lock").acquire(timeout=0)
    child.communicate(b"\n")
    Lock(tmp_path / "lock").acquire(timeout=5).release()


ELSEWHERE = {"host": "node7", "boot": "x", "pid": 1, "started": "1"}


@pytest.mark.parametrize(
    ("holder", "seconds", "free"),
    [
        (ELSEWHERE, 0, False),
        (ELSEWHERE, locks.STALE_SECONDS - 60, False),
        (ELSEWHERE, locks.STALE_SECONDS + 5, True),
        ({}, 0, False),
        ({}, locks.STALE_SECONDS + 5, True),
        ([], locks.STALE_SECONDS + 5, True),
        ({"host": os.uname().nodename, "boot": "before", "pid": os.getpid()}, 0, False),
    ],
)
def test_a_holder_on_another_machine_is_known_by_the_time_of_its_file(holder, seconds, free, without, tmp_path):
    without(errno.ENOSYS)
    claim = tmp_path / "lock.held"
    claim.write_text(json.dumps(holder))
    then = time.time() - seconds
    os.utime(claim, (then, then))
    lock = Lock(tmp_path / "lock")
    if free:
        lock.acquire(timeout=0.5).release()
    else:
        with pytest.raises(Busy):
            lock.acquire(timeout=0.05)
        assert json.loads(claim.read_text()) == holder


def test_nothing_is_touched_through_a_link(without, tmp_path):
    """The clock of the file system is read from a new file, of a name that nobody can know before."""
    without(errno.ENOSYS)
    claim, theirs, planted = (tmp_path / name for name in ("lock.held", "theirs", f"lock.held.{os.getpid()}"))
    claim.write_text(json.dumps(ELSEWHERE))
    theirs.write_text("x")
    planted.symlink_to(theirs)
    for file in (claim, theirs):
        os.utime(file, (1, 1))
    Lock(tmp_path / "lock").acquire(timeout=0.5).release()
    assert theirs.stat().st_mtime == 1
    assert {path.name for path in tmp_path.iterdir()} == {"lock", theirs.name, planted.name}


def test_a_process_with_the_number_of_a_dead_one_does_not_hold_it(without, tmp_path):
    without(errno.ENOSYS)
    claimed = locks._this_process() | {"started": "17"}
    (tmp_path / "lock.held").write_text(json.dumps(claimed))
    Lock(tmp_path / "lock").acquire(timeout=0.5).release()


def test_a_claim_is_renewed(without, tmp_path, monkeypatch):
    without(errno.ENOSYS)
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.01)
    lock = Lock(tmp_path / "lock").acquire()
    os.utime(tmp_path / "lock.held", (1, 1))
    until = time.monotonic() + 10
    while (tmp_path / "lock.held").stat().st_mtime == 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    lock.release()


def test_what_is_wrong_otherwise_is_said(without, tmp_path):
    without(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        Lock(tmp_path / "lock").acquire(timeout=0)
