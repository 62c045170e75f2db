"""A terminal, or what stands in its place, can't stop a run: nobody reads it, its reader has left, it was never there, it
is closed."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.runtime import streams
from pretrain.runtime.streams import NonBlockingStream
from pretrain.telemetry.run_file import read_run_file
from tests.preloaded import Preloaded

ROOT = Path(__file__).parents[2]
PAIR = ["strategy=ddp", "devices=2", "batch_size=1"]


def wait_for(condition, process, seconds=90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)


@pytest.fixture
def shell(tmp_path):
    """``shell(line)`` with ``$run`` for ``python -m pretrain``: the exit code of bash, stdout, stderr."""

    def run(line, arguments=()):
        script = f'run() {{ "{sys.executable}" -m pretrain "$@"; }}; set -o pipefail; {line}'
        done = subprocess.run(
            ["bash", "-c", script, "bash", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd=ROOT,
        )
        return done.returncode, done.stdout, done.stderr

    return run


# -- the stream alone ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    """An outlet into a pipe, and the pipe's other end."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as reader, os.fdopen(write, "w") as writer:
        yield NonBlockingStream(writer), reader


def test_a_reader_gets_everything_in_order(pipe):
    outlet, reader = pipe
    read = []
    thread = threading.Thread(target=lambda: read.extend(iter(lambda: reader.read(4096), b"")))
    thread.start()
    for i in range(300):
        print(f"line {i} ü", file=outlet)  # two pieces each
    outlet.drain()
    outlet.stream.close()
    thread.join()
    assert b"".join(read).decode().splitlines() == [f"line {i} ü" for i in range(300)]


def test_a_pipe_that_nobody_reads_takes_no_time_and_says_what_is_missing(pipe, monkeypatch):
    monkeypatch.setattr(streams, "PATIENCE_SECONDS", 0.05)
    outlet, reader = pipe
    line = "x" * 999 + "\n"
    for _ in range(3 * streams.MOST_WAITING):  # 3 MB into a pipe of 64 kB: this returns, or the test hangs
        outlet.write(line)
    outlet.drain()  # gives up
    read = b""
    while b"missing here" not in read:
        read += reader.read(1 << 16)
    lost = int(read.split("… ".encode())[1].split()[0])
    assert 1000 < lost < 3 * streams.MOST_WAITING


def test_a_reader_that_leaves_is_no_error(pipe):
    outlet, reader = pipe
    reader.close()
    for _ in range(3):
        print("into the void", file=outlet, flush=True)
    outlet.drain()


def test_a_signal_handler_may_speak_in_the_middle_of_a_line(pipe):
    """A lock would wait for itself there."""
    outlet, reader = pipe
    before = signal.signal(signal.SIGUSR1, lambda number, frame: print("heard", file=outlet))
    try:
        for _ in range(100):
            outlet.write("a")
            signal.raise_signal(signal.SIGUSR1)
            outlet.write("b\n")
    finally:
        signal.signal(signal.SIGUSR1, before)
    outlet.drain()
    assert reader.read(1 << 16).count(b"heard") == 100


# -- whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], pytest.param(PAIR, marks=pytest.mark.slow)], ids=["single", "pair"])
def test_a_full_pipe_does_not_stop_a_run(more, base_arguments, tmp_path):
    """Some 10 kB into a pipe of 4 kB that is never read."""
    command = [*base_arguments, *more, f"output_dir={tmp_path}", "max_steps=80", "evaluate_every=null"]
    command += ["save_every=null", "sink=[console, jsonl]", "sink.console.level=4"]
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    process = Preloaded([sys.executable, "-m", "pretrain", *command], stdout=write, stderr=write)
    os.close(write)
    try:
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
    taken = os.read(read, 1 << 20)
    assert b"step  1/80" in taken
    assert b"step 80/80" not in taken, "it was full"
    assert read_run_file(tmp_path)["status"] == "finished"


def test_the_reader_of_the_pipe_leaves(base_arguments, tmp_path):
    command = [sys.executable, "-m", "pretrain", *base_arguments, f"output_dir={tmp_path}"]
    with Preloaded(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out = subprocess.check_output(["head", "-1"], stdin=process.stdout, text=True)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1
    assert all(line.startswith("evaluating ") for line in err.splitlines())
    assert read_run_file(tmp_path)["status"] == "finished"


@pytest.mark.parametrize("line", ["run --help | head -1", "run --cfg job | head -1"])
def test_the_reader_of_help_leaves(line, shell):
    code, out, err = shell(line)
    assert (code, len(out.splitlines()), err) == (0, 1, "")


@pytest.mark.parametrize(
    ("closed", "more"),
    [
        pytest.param("2>&-", [], id="single"),
        pytest.param("<&- >&- 2>&-", PAIR, id="pair", marks=pytest.mark.slow),
    ],
)
def test_streams_that_were_never_there(closed, more, base_arguments, tmp_path, shell):
    code, _, err = shell(f'run "$@" {closed}', [*base_arguments, *more, f"output_dir={tmp_path}", "max_steps=6"])
    assert code == 0, err
    assert read_run_file(tmp_path)["status"] == "finished"
    assert b"\0" not in (tmp_path / "metrics.jsonl").read_bytes()


@pytest.fixture
def terminal():
    """Start a command of Python in a session with a terminal of its own: ``terminal(words)`` is the process and the terminal's
    other end."""
    started = []

    def start(*words, kind=Preloaded):
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        environment = os.environ | {"TERM": "xterm-256color"}
        command = [sys.executable, *map(str, words)]
        started.append(kind(command, **streams, env=environment, start_new_session=True))
        os.close(theirs)
        return started[-1], ours

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_terminal_shows_the_run(base_arguments, tmp_path, terminal):
    """A real one: the bar with the curve of the loss, which is drawn over; above it what stays."""
    process, screen = terminal("-m", "pretrain", *base_arguments, f"output_dir={tmp_path}")
    shown = b""
    with suppress(OSError):  # the other end is closed: Linux says EIO
        while piece := os.read(screen, 1 << 16):
            shown += piece
    os.close(screen)
    assert process.wait() == 0, shown.decode()
    assert re.search(rb"\x1b\[\d+A", shown), "it is drawn over"
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert "10/20 ━" in text
    assert re.search("loss \\d.*[▁▂▃▄▅▆▇█]{10}", text)
    assert "step 10/20" not in text
    assert re.search("step  8  .*(better|worse) than at step 0", text)
    assert re.search("after +[^\r]", text), "a sample"
    assert f"records  {tmp_path}/metrics.jsonl" in text


def test_a_mistake_without_a_stderr(shell):
    assert shell("run strategie=ddp 2>&-")[0] == 2
    assert shell("run strategie=ddp 2>&1 | true")[0] == 2


UNDER_NOHUP = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from pretrain.cli.main import program
program()
"""


@pytest.mark.parametrize("more", [[], pytest.param(PAIR, marks=pytest.mark.slow)], ids=["single", "pair"])
@pytest.mark.parametrize("nohup", [False, True])
def test_the_terminal_is_closed(nohup, more, base_arguments, tmp_path, terminal):
    """A real terminal, whose other end goes. Without nohup that asks the run to stop, with it nothing happens."""
    arguments = [*base_arguments, *more, f"output_dir={tmp_path}", "evaluate_every=null", "save_every=null"]
    arguments += ["max_steps=150" if nohup else "max_steps=100000"]
    if nohup:  # which is noticed when the program is imported
        process, screen = terminal("-c", UNDER_NOHUP, *arguments, kind=subprocess.Popen)
    else:
        process, screen = terminal("-m", "pretrain", *arguments)
    records = tmp_path / "metrics.jsonl"
    until = time.monotonic() + 90
    while not (records.exists() and '"step": 5,' in records.read_text()):
        assert time.monotonic() < until
        os.read(screen, 1 << 16)
    os.close(screen)
    try:
        code = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        pytest.fail("it neither stopped nor finished")
    facts = read_run_file(tmp_path)
    if nohup:
        assert (code, facts["status"]) == (0, "finished")
    else:
        assert (code, facts["status"]) == (75, "stopped")
        assert (tmp_path / f"checkpoints/step-{facts['steps']:08d}/COMPLETE.json").exists()
