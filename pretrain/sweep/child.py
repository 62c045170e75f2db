"""What the process of a job does differently from the same command typed by a person: it says in a file why it failed,
and it saves and ends when the command that has started it is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from pretrain.runtime.atomic_files import replace_file
from pretrain.runtime.redact import redact
from pretrain.runtime.signals import EXIT_CODE

VARIABLE = "PRETRAIN_SWEEP_JOB"  # "<pid of the parent> <file for the reason of a failure>"
PR_SET_PDEATHSIG = 1  # of prctl(2)
LONGEST_REASON = 500  # characters

_note: Path | None = None


def environment(note: Path) -> dict[str, str]:
    """For the process of a job that this process starts."""
    return {**os.environ, VARIABLE: f"{os.getpid()} {note.absolute()}"}


def enter() -> None:
    """Called first of all, in every process of the command line."""
    global _note
    if VARIABLE not in os.environ:
        return
    parent, _, note = os.environ.pop(VARIABLE).partition(" ")  # the job's own children are nobody's jobs
    _note = Path(note)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it was gone before
            sys.exit(EXIT_CODE)


def note_failure(reason: str) -> None:
    """Leave the last line of ``reason`` to the sweep; nothing in a command that is no job."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    if _note is not None and lines:
        with suppress(OSError):  # a full disk: the table then has the exit code only
            replace_file(_note, redact(lines[-1])[:LONGEST_REASON])
