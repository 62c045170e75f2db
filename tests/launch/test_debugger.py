"""One process is the command itself, under any strategy: a breakpoint in it is answered from the keyboard."""

import os
import pty
import sys

import pytest

from pretrain.telemetry.run_file import read_run_file
from tests.preloaded import Preloaded, run_preloaded
from tests.runs import injected

pytestmark = pytest.mark.slow
STOP = """
import torch
step = torch.optim.AdamW.step
def stopping(self, *given, **more):
    if not self.state:
        breakpoint()
    return step(self, *given, **more)
torch.optim.AdamW.step = stopping
"""


@pytest.fixture
def stopped_run(base_arguments, tmp_path):
    """The words and the environment of a run of one process that stops at its first update."""
    given = ["strategy=fsdp", "devices=1", "max_steps=2", "sink=jsonl", f"output_dir={tmp_path / 'run'}"]
    return ["-m", "pretrain", *base_arguments, *given], injected(tmp_path, STOP)


def test_answers_from_a_pipe(stopped_run, tmp_path):
    words, environment = stopped_run
    done = run_preloaded(words, input="p 6 * 7\nc\n", timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "(Pdb) 42\n" in done.stdout
    assert read_run_file(tmp_path / "run")["steps"] == 2


def test_answers_from_a_terminal(stopped_run, tmp_path):
    words, environment = stopped_run
    ours, theirs = pty.openpty()
    words = [sys.executable, *words]
    with Preloaded(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen, answers = b"", [b"p 6 * 7\n", b"c\n"]
        try:
            while chunk := os.read(ours, 1 << 16):
                seen += chunk
                if answers and seen.count(b"(Pdb) ") == 3 - len(answers):
                    os.write(ours, answers.pop(0))
        except OSError:  # EIO: the last one that had the terminal has left
            pass
        os.close(ours)
    assert process.returncode == 0, seen
    assert b"42\r\n" in seen
    assert read_run_file(tmp_path / "run")["steps"] == 2
