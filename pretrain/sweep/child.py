"""What the process of a sweep job does in addition to a normal run: it writes the reason of a failure to a file, and it saves
and exits when the process that started it dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from pretrain.runtime.files import replace_file
from pretrain.runtime.redact import redact
from pretrain.runtime.signals import EXIT_CODE

VARIABLE = "PRETRAIN_SWEEP_JOB"  # "<pid of the parent> <file for the reason of a failure>"
PR_SET_PDEATHSIG = 1  # option of prctl(2)
MAX_REASON = 500  # characters

_error_file: Path | None = None


def environment(error_file: Path) -> dict[str, str]:
    """Return the environment for the process of a job that this process starts."""
    return {**os.environ, VARIABLE: f"{os.getpid()} {error_file.absolute()}"}


def enter() -> None:
    """Set this process up as a sweep job, if it is one. Every process of the command line calls this first."""
    global _error_file
    if VARIABLE not in os.environ:
        return
    parent, _, error_file = os.environ.pop(VARIABLE).partition(
        " "
    )  # popped, because the job's own children are not sweep jobs
    _error_file = Path(error_file)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # the parent died before prctl
            sys.exit(EXIT_CODE)


def note_failure(reason: str) -> None:
    """Write the last line of ``reason`` for the sweep. This does nothing if the process is not a sweep job."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    if _error_file is not None and lines:
        with suppress(OSError):  # on a full disk the table has only the exit code
            replace_file(_error_file, redact(lines[-1])[:MAX_REASON])
