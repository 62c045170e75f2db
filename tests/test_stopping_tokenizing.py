"""A stop signal to all processes of a run that tokenizes, as a terminal or a scheduler sends it: exit code 75, nobody is
left, and what was finished is used by the next start."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import sentences
from tests.launch.test_launch import PAIR, ended, wait_for
from tests.runs import injected

UNITS = 24
MANY_UNITS = """
from pretrain.data.tokenization import tokenize; from pretrain.data.reading import units
tokenize.WORKERS_FROM_BYTES, units.OWN_UNIT_BYTES = {workers_from}, 10_000
"""
TAKEN_BY_ANOTHER_THREAD = """
import os, signal, sys, threading, time
from pathlib import Path

def take():
    while not list(Path(os.environ["PRETRAIN_CACHE"]).glob("parts/*/*.tokens")):
        time.sleep(0.005)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

if "pretrain.data.tokenization.workers" not in sys.orig_argv:
    threading.Thread(target=take, daemon=True).start()
"""
IN_WORKERS, IN_PROCESS = 0, 2**60
ALONE = ["task=tokenization"]


@pytest.fixture
def texts(tmp_path) -> Path:
    """Files that are a unit each."""
    folder, text = tmp_path / "texts", sentences(0, 4000)
    folder.mkdir()
    for i in range(UNITS):
        (folder / f"{i:02}.txt").write_text(f"{i} {text}")
    return folder


def parts(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.glob("parts/*/*.tokens")}


def tokenizing_workers(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "pretrain.data.tokenization.workers" in child.cmdline():
                found.append(child)
    return found


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("number", "workers_from", "finished", "more"),
    [
        (signal.SIGINT, IN_WORKERS, 0, ALONE),  # while they import
        (signal.SIGTERM, IN_WORKERS, 2, ALONE),
        slow(signal.SIGTERM, IN_WORKERS, 0, ALONE),
        slow(signal.SIGINT, IN_WORKERS, 2, ALONE),
        slow(signal.SIGUSR1, IN_WORKERS, 2, ALONE),
        *(slow(number, IN_PROCESS, 2, ALONE) for number in (signal.SIGINT, signal.SIGTERM)),
        *(
            slow(number, IN_WORKERS, finished, PAIR)
            for number in (signal.SIGINT, signal.SIGTERM)
            for finished in (0, 2)
        ),
        *(slow(number, IN_PROCESS, 2, PAIR) for number in (signal.SIGINT, signal.SIGTERM)),
    ],
)
def test_while_tokenizing(number, workers_from, finished, more, texts, base_arguments, spawn, tmp_path):
    cache = tmp_path / "cache"
    environment = injected(tmp_path, MANY_UNITS.format(workers_from=workers_from)) | {"PRETRAIN_CACHE": str(cache)}
    arguments = [*base_arguments, f"dataset.nameOrPath={texts}", "dataset.num_workers=2", "max_steps=2"]
    arguments += [*more, f"output_dir={tmp_path / 'run'}"]
    process = spawn(arguments, env=environment, start_new_session=True)
    wait_for(lambda: workers_from or tokenizing_workers(process.pid), process)
    wait_for(lambda: len(parts(cache)) >= finished, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGSTOP)  # the slowest of all to hear it
    os.killpg(process.pid, number)
    time.sleep(0.5)
    if more is ALONE:
        assert not [worker for worker in everyone if worker.status() == psutil.STATUS_ZOMBIE], "the caller decides"
    process.send_signal(signal.SIGCONT)
    out = ended(process, everyone)
    assert process.returncode == 75, out
    assert "Traceback" not in out
    kept = parts(cache)
    assert finished <= len(kept) < UNITS
    assert not list(cache.rglob(".*.partial"))
    process = spawn(arguments, env=environment)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert kept.items() < parts(cache).items(), "what was finished is not made again"


def test_a_signal_that_another_thread_takes(texts, base_arguments, spawn, tmp_path):
    """As may happen to one that was sent to a suspended process: the thread that waits for workers does not wake of it."""
    cache = tmp_path / "cache"
    fault = MANY_UNITS.format(workers_from=IN_WORKERS) + TAKEN_BY_ANOTHER_THREAD
    arguments = [*base_arguments, f"dataset.nameOrPath={texts}", "dataset.num_workers=2", *ALONE]
    process = spawn(
        [*arguments, f"output_dir={tmp_path / 'run'}"], env=injected(tmp_path, fault) | {"PRETRAIN_CACHE": str(cache)}
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert 0 < len(parts(cache)) < UNITS
