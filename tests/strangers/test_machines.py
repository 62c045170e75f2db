"""Machines, disks and accounts that lack something: the run does without, or says in one line what to change.

Rows: machine → exit code, words, what must still be there. The errors are those that such a machine answers with.
"""

import contextlib
import errno
import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint.marker import incomplete_reason
from pretrain.runtime import filesystem
from pretrain.runtime.errors import UserError
from pretrain.telemetry.run_file import read_run_file
from tests.runs import losses

SLOW = pytest.mark.slow


def fail(number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def of_folders(real, number):
    """``real`` for files, an error for folders."""

    def call(first, *more, **named):
        folder = os.path.isdir(first) if isinstance(first, str | os.PathLike) else _is_folder(first)
        if folder:
            raise OSError(number, os.strerror(number))
        return real(first, *more, **named)

    return call


def _is_folder(descriptor):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


DISKS = {
    "flock: ENOSYS (FUSE)": lambda m: m.setattr(fcntl, "flock", fail(errno.ENOSYS)),
    "flock: ENOLCK (NFS without its daemon)": lambda m: m.setattr(fcntl, "flock", fail(errno.ENOLCK)),
    "fsync of a folder: EINVAL (CIFS)": lambda m: m.setattr(os, "fsync", of_folders(os.fsync, errno.EINVAL)),
    "fsync: ENOSYS": lambda m: m.setattr(os, "fsync", fail(errno.ENOSYS)),
    "chmod: EPERM (exFAT)": lambda m: m.setattr(os, "chmod", fail(errno.EPERM)),
    "mmap: ENODEV (9p)": lambda m: m.setattr(np, "memmap", fail(errno.ENODEV)),
    "rename of a folder: EXDEV (overlay)": lambda m: m.setattr(os, "rename", of_folders(os.rename, errno.EXDEV)),
    "statvfs: ENOSYS": lambda m: m.setattr(shutil, "disk_usage", fail(errno.ENOSYS)),
    "utime: EPERM": lambda m: m.setattr(os, "utime", fail(errno.EPERM)),
    "the year 1973": lambda m: m.setattr(time, "time", lambda: 1e8),
    "all of them": lambda m: [make(m) for name, make in DISKS.items() if name != "all of them"],
}


@pytest.mark.parametrize("disk", [pytest.param(d, marks=[SLOW] * (d != "all of them")) for d in DISKS])
def test_a_disk_that_can_less(disk, base_arguments, command, tmp_path, monkeypatch):
    """The run is the same, twice over: trained, and found finished."""
    run = tmp_path / "run"
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    given = [*base_arguments, f"output_dir={run}", "max_steps=12", "checkpoint.keep_last=1"]
    DISKS[disk](monkeypatch)
    code, _, err = command(given)
    assert code == 0, err
    assert "Traceback" not in err
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000012"]
    assert incomplete_reason(run / "checkpoints/step-00000012", verify="full") is None
    assert (run / "model/config.json").exists()
    code, _, err = command(given)
    assert code == 0, err
    assert f"{run} is finished: 12 steps" in err
    code, _, err = command([*given, "resume=never"])
    assert code == 0, err
    assert losses(run) == losses(tmp_path / "run.old-1"), "the earlier run is there, whole"
    assert not list(tmp_path.rglob("*.held")), "nothing is locked any more"


PLACES = {  # what is set → words
    "a cache under a file": ({"PRETRAIN_CACHE": "{file}/cache"}, "cannot write the token cache"),
    "a cache where nothing can be made": ({"PRETRAIN_CACHE": "/proc/nowhere/cache"}, "set PRETRAIN_CACHE to a folder"),
    "a home that is none": (
        {"HOME": "/proc/nowhere", "PRETRAIN_CACHE": "", "XDG_CACHE_HOME": ""},
        "set PRETRAIN_CACHE",
    ),
    "a home that is a file": ({"HOME": "{file}", "PRETRAIN_CACHE": "", "XDG_CACHE_HOME": ""}, "set PRETRAIN_CACHE"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written(place, base_arguments, command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    variables, words = PLACES[place]
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(file=tmp_path / "file"))
    code, _, err = command([*base_arguments, f"output_dir={tmp_path / 'run'}"])
    assert code == 2, err
    assert words in err
    assert err.count("error: ") == err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_an_account_without_a_name_or_home(base_arguments, command, tmp_path, monkeypatch):
    """As a container has one: no HOME, and the number is in no passwd."""

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "PRETRAIN_CACHE", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    given = [*base_arguments, f"output_dir={tmp_path / 'run'}", "max_steps=1"]
    code, _, err = command(given)
    assert (code, err) == (
        2,
        "error: no place for the token cache: this account has no home; set PRETRAIN_CACHE to a folder\n",
    )
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    code, _, err = command(given)
    assert code == 0, err


@pytest.mark.parametrize("output", ["/proc/nowhere/run", "{file}/run"])
def test_an_output_folder_that_cannot_be_made(output, base_arguments, command, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = command([*base_arguments, f"output_dir={output.format(file=tmp_path / 'file')}"])
    assert code == 2, err
    assert "output_dir=" in err
    assert "can't be written: " in err
    assert "None" not in err


def test_a_folder_that_is_gone(base_arguments, command, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = command(base_arguments)
    assert (code, err) == (
        2,
        "error: the current folder no longer exists: No such file or directory; change to another one\n",
    )


@pytest.mark.parametrize("more", [["strategy=single"], ["strategy=ddp", "devices=2"], ["task=evaluation"]])
def test_no_place_for_temporary_files(more, command, base_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    code, _, err = command([*base_arguments, *more, f"output_dir={tmp_path / 'run'}"])
    assert code == 2, err
    assert "set TMPDIR to one" in err


def test_a_compilers_cache_that_cannot_be_made(command, base_arguments, tmp_path, monkeypatch):
    """torch makes it when it is imported, also where nothing is compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nowhere")
    code, _, err = command([*base_arguments, f"output_dir={tmp_path / 'run'}"])
    assert code == 2, err
    assert "error: TORCHINDUCTOR_CACHE_DIR=/proc/nowhere: can't be created: No such file" in err


def test_a_place_for_temporary_files_that_is_no_place_for_sockets(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "long" * 30)
    with pytest.raises(UserError, match="set it to a shorter one"):
        filesystem.check_place_for_sockets()


def test_shared_memory_that_is_not_there(command, base_arguments, tmp_path, monkeypatch):
    import _multiprocessing

    monkeypatch.setattr(_multiprocessing, "SemLock", fail(errno.ENOENT))
    code, _, err = command([*base_arguments, "strategy=ddp", "devices=2", f"output_dir={tmp_path / 'run'}"])
    assert code == 2, err
    assert "mount a tmpfs at /dev/shm" in err


def test_a_mask_that_hides_all_from_others(base_arguments, command, tmp_path, monkeypatch):
    mask = os.umask(0o077)
    try:
        code, _, err = command([*base_arguments, f"output_dir={tmp_path / 'run'}", "max_steps=1"])
    finally:
        os.umask(mask)
    assert code == 0, err
    assert read_run_file(tmp_path / "run")["status"] == "finished"


# -- processes of their own ----------------------------------------------------------------------------------------------


def test_a_terminal_that_is_not_utf8():
    """Names of any language come out as UTF-8, and nothing is read or written in another encoding."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment.pop("PYTHONIOENCODING", None)
    words = [sys.executable, "-m", "pretrain", "--cfg", "job", "name='книга'"]
    done = subprocess.run(words, capture_output=True, check=False, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "name: книга" in done.stdout.decode("utf-8")


MACHINES = {  # in namespaces of its own: a shell line → exit code, words
    "a machine whose name leads nowhere": ("python3 -c \"import socket; socket.sethostname('nobody-knows')\"", 0, ""),
    "no /dev/shm": ("mount -t tmpfs -o ro none /dev/shm", 2, "mount a tmpfs at /dev/shm"),
    "no /tmp, TMPDIR gone": (
        "for d in /tmp /var/tmp /usr/tmp; do [ ! -d $d ] || mount -t tmpfs -o ro none $d; done; cd /tmp; export TMPDIR=/nowhere",
        2,
        "set TMPDIR",
    ),
}


@SLOW
@pytest.mark.parametrize("machine", MACHINES)
def test_two_processes_on(machine, base_arguments, tmp_path, request):
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("mounting needs root, and the command unshare (util-linux)")
    line, code, words = MACHINES[machine]
    if "/tmp" in line and Path(tempfile.gettempdir()) in tmp_path.parents:
        base_arguments = ["model_name=sample"]  # what the tests have made lies there
    with contextlib.ExitStack() as stack:
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.home())))
        given = [
            *base_arguments,
            "strategy=ddp",
            "devices=2",
            "batch_size=1",
            "max_steps=3",
            f"output_dir={run / 'run'}",
        ]
        inside = ["unshare", "--mount", "--uts", "sh", "-c", f'{line}\nexec "$@"', "sh"]
        command = [*inside, sys.executable, "-m", "pretrain", *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
