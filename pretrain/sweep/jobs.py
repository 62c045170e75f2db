"""The jobs of a sweep: each is this program again in a fresh process, so that no state of one can leak into another.

`Sweep` is the function that Hydra's launchers call, here or in processes of theirs; it travels as a pickle. What is known
of a job stands in its folder alone, so that any number of processes may write at once.
"""

from __future__ import annotations

import math
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pretrain.config import quoting
from pretrain.runtime.console import notice
from pretrain.runtime.python import module_command
from pretrain.runtime.signals import EXIT_CODE, SIGNALS, Stopped
from pretrain.sweep import child
from pretrain.sweep.job import DONE, SweepJob, job_of, jobs_in
from pretrain.sweep.measure import measures_of, objective_in
from pretrain.sweep.table import write

LOOK_SECONDS = 0.5  # between looks whether a job is to be pruned


@dataclass(frozen=True)
class Outcome:
    """``status``: finished · failed · stopped · pruned. ``objective``: ``None`` where there is none."""

    job: SweepJob
    status: str
    exit_code: int
    objective: float | None


@dataclass(frozen=True)
class Sweep:
    """``keys``: those that are swept. ``command``: the words after ``python -m pretrain``. ``began_at``: Unix seconds; the
    jobs of this command bear it, whichever process runs them. ``total``: how many, where that is known.
    ``config_dir``: of ``--config-dir``."""

    folder: Path
    keys: tuple[str, ...]
    metric: str
    direction: str
    command: tuple[str, ...]
    began_at: float
    total: int | None = None
    config_dir: str | None = None

    def __call__(self, config: DictConfig) -> float:
        """For Hydra: run the job whose configuration is composed; its objective, NaN where there is none.

        Raises ``Stopped`` when somebody has asked to stop.
        """
        outcome = run_job(self, list(HydraConfig.get().overrides.task))
        return math.nan if outcome.objective is None else outcome.objective

    def job(self, overrides: list[str]) -> SweepJob:
        """The job with these overrides, in whatever order; one that is new gets its folder."""
        return job_of(self.folder, overrides, self.keys)

    def place(self, job: SweepJob) -> str:
        """``3 of 8``: which of this command's jobs it is."""
        own = [other.name for other, state in jobs_in(self.folder) if state.get("began_at") == self.began_at]
        return f"{own.index(job.name) + 1}" + (f" of {self.total}" if self.total else "")

    def words(self, job: SweepJob) -> list[str]:
        """The words of the job as a command, with its own folder."""
        config_dir = ["--config-dir", self.config_dir] if self.config_dir else []
        own = [] if any(o.startswith("output_dir=") for o in job.overrides) else [f"output_dir={quoted(job.folder)}"]
        return [*config_dir, *job.words, *own]

    def expect(self, job: SweepJob) -> None:
        """List the job as one of this command, unless another command is at work on it."""
        if (held := job.lock()) is not None:
            self.begin(job)
            held.release()

    def begin(self, job: SweepJob) -> dict[str, Any]:
        """The job's state, marked as one of this command; ``waiting`` unless there is nothing left to do. What an earlier
        attempt has left, the reason it failed and the wish to prune it, is not this one's."""
        for left in (job.note, job.prune_file):
            left.unlink(missing_ok=True)
        state = job.read()
        status = state.get("status") if state.get("status") in DONE else "waiting"
        job.write(began_at=self.began_at, status=status, error=None if status == "waiting" else state.get("error"))
        return job.read()

    def end(self, job: SweepJob, state: dict[str, Any], code: int, seconds: float) -> Outcome:
        """Write down how a job's process has left."""
        pruned = job.prune_file.exists()
        status = {0: "finished", EXIT_CODE: "pruned" if pruned else "stopped"}.get(code, "failed")
        error = _reason(job, code) if status == "failed" else None
        known = {k: state[k] for k in ("created", "began_at") if k in state}  # its folder may be a new one by now
        job.write(**known, status=status, exit_code=code, error=error, seconds=state.get("seconds", 0.0) + seconds)
        return self.outcome(job)

    def outcome(self, job: SweepJob) -> Outcome:
        state = job.read()
        status = state.get("status", "failed")
        objective = objective_in(measures_of(job.folder), self.metric) if status in DONE else None
        return Outcome(job, status, state.get("exit_code") or 0, objective)

    def write_table(self, status: str = "running", *, with_page: bool = True) -> dict[str, Any]:
        """Bring sweep.json up to date, and sweep.html; what stands in the former."""
        told = {"command": self.command_line, "metric": self.metric, "direction": self.direction, "status": status}
        return write(self.folder, **told, with_page=with_page)

    @property
    def command_line(self) -> str:
        """What continues this sweep."""
        said = (
            []
            if any(w.startswith(("sweep_dir=", "hydra.sweep.dir=")) for w in self.command)
            else [f"sweep_dir={quoted(self.folder)}"]
        )
        return shlex.join(["python", "-m", "pretrain", *self.command, *said])


def run_job(
    sweep: Sweep, overrides: list[str], *, asked: list[str] | None = None, environment: dict[str, str] | None = None
) -> Outcome:
    """Run one job in a fresh process and wait for it; at once when it is known to be done.

    A job that fails has an exit code and no objective. Raises ``Stopped`` when this process or the job's was asked to
    stop; a job whose ``prune_file`` appears is stopped alone. ``asked``: the signals that came to a caller who runs several
    jobs, each in a thread, filled at any time; ``environment``: of the job, besides this process's.
    """
    if asked:
        raise Stopped(asked[0])
    asked = [] if asked is None else asked
    job = sweep.job(overrides)
    with job.alone() as held:
        state = sweep.begin(job)
        if state["status"] in DONE:
            notice(f"{job.name}: {state['status']} before, not run again")
            return sweep.outcome(job)
        job.write(status="running", locked=True)
        notice(f"job {sweep.place(job)}: {job.name}")
        sweep.write_table()
        started_at = time.monotonic()
        process = subprocess.Popen(
            [*module_command("pretrain"), *sweep.words(job)],
            env=child.environment(job.note) | (environment or {}),
            pass_fds=held.descriptors,  # the job is at work as long as this process lives, whatever becomes of ours
        )
        # The job decides when to stop. A terminal sends Ctrl-C to it too, and it passes over the second word for one wish.
        with hearing(asked, lambda n: process.send_signal(signal.SIGTERM if n == signal.SIGINT else n)):
            code = _wait(process, job, asked)
        outcome = sweep.end(job, state, code, time.monotonic() - started_at)
    sweep.write_table(with_page=False)  # the next job's start and the end of the sweep draw it
    if outcome.status == "failed":
        notice(f"{job.name}: failed: {job.read()['error']}")
    if asked or outcome.status == "stopped":
        raise Stopped(asked[0] if asked else f"{job.name} was stopped and has saved")
    return outcome


def _wait(process: subprocess.Popen[bytes], job: SweepJob, asked: list[str]) -> int:
    """The exit code; 128 + the signal that killed the process, as shells say it."""
    told = False
    while True:
        try:
            code = process.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            if not told and (asked or job.prune_file.exists()):
                told = True
                process.terminate()
        else:
            return code if code >= 0 else EXIT_CODE if -code == signal.SIGTERM else 128 - code


@contextmanager
def hearing(asked: list[str], pass_on: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """Meanwhile the signals that ask to stop are added to ``asked`` by name and passed on; in the main thread, as they
    arrive in no other."""

    def hear(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        pass_on(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(job: SweepJob, code: int) -> str:
    if job.note.exists():
        return job.note.read_text().removeprefix("error: ")
    if code > 128:
        name = signal.Signals(code - 128).name if code - 128 in list(signal.Signals) else str(code - 128)
        return f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    return f"exit code {code}"


def quoted(path: Path) -> str:
    """A path as a value that Hydra's grammar leaves alone."""
    return str(path) if re.fullmatch(r"[\w./-]+", str(path), re.ASCII) else quoting.quoted(str(path))
