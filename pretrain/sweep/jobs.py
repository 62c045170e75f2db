"""Run the jobs of a sweep. Each job runs this program in a new process, so that no state leaks from one job to another.

`Sweep` is the function that Hydra's launchers call, in this process or, pickled, in processes of the launcher. The state of a
job is stored only in its folder, so that any number of processes can write at once.
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

CHECK_SECONDS = 0.5  # between checks whether a job is to be pruned


@dataclass(frozen=True)
class Outcome:
    """The result of a job. ``status`` is finished · failed · stopped · pruned; ``objective`` is the value of the sweep's
    metric, or ``None`` if the run has none."""

    job: SweepJob
    status: str
    exit_code: int
    objective: float | None


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        folder: Folder of the sweep.
        keys: Keys that are swept.
        metric: Metric by which jobs are ranked.
        direction: ``minimize`` or ``maximize``.
        command: Arguments of the command line after ``python -m pretrain``.
        began_at: Start of the command in Unix seconds. The jobs of this command have the same value in job.json, regardless
            of the process that runs them.
        total: Number of jobs, if it is known.
        config_dir: Value of ``--config-dir``.
    """

    folder: Path
    keys: tuple[str, ...]
    metric: str
    direction: str
    command: tuple[str, ...]
    began_at: float
    total: int | None = None
    config_dir: str | None = None

    def __call__(self, config: DictConfig) -> float:
        """Run the job whose configuration Hydra has composed. Return its objective, or NaN if it has none.

        Raises ``Stopped`` after a stop signal.
        """
        outcome = run_job(self, list(HydraConfig.get().overrides.task))
        return math.nan if outcome.objective is None else outcome.objective

    def job(self, overrides: list[str]) -> SweepJob:
        """Return the job with these overrides in any order; if it is new, create its folder."""
        return job_of(self.folder, overrides, self.keys)

    def position(self, job: SweepJob) -> str:
        """Return the job's position among this command's jobs, such as ``3 of 8``."""
        own = [other.name for other, state in jobs_in(self.folder) if state.get("began_at") == self.began_at]
        return f"{own.index(job.name) + 1}" + (f" of {self.total}" if self.total else "")

    def arguments(self, job: SweepJob) -> list[str]:
        """Return the arguments of the job's command line, with its own folder as ``output_dir``."""
        config_dir = ["--config-dir", self.config_dir] if self.config_dir else []
        own = [] if any(o.startswith("output_dir=") for o in job.overrides) else [f"output_dir={quoted(job.folder)}"]
        return [*config_dir, *job.arguments, *own]

    def expect(self, job: SweepJob) -> None:
        """Mark the job as one of this command, unless another command is running it."""
        if (held := job.lock()) is not None:
            self.begin(job)
            held.release()

    def begin(self, job: SweepJob) -> dict[str, Any]:
        """Mark the job as one of this command and return its state: ``waiting``, unless it is done. The files of an earlier
        attempt, the reason of its failure and the request to prune it, are deleted."""
        for left in (job.error_file, job.prune_file):
            left.unlink(missing_ok=True)
        state = job.read()
        status = state.get("status") if state.get("status") in DONE else "waiting"
        job.write(began_at=self.began_at, status=status, error=None if status == "waiting" else state.get("error"))
        return job.read()

    def end(self, job: SweepJob, state: dict[str, Any], code: int, seconds: float) -> Outcome:
        """Write the exit of a job's process to job.json and return the outcome."""
        pruned = job.prune_file.exists()
        status = {0: "finished", EXIT_CODE: "pruned" if pruned else "stopped"}.get(code, "failed")
        error = _reason(job, code) if status == "failed" else None
        known = {
            k: state[k] for k in ("created", "began_at") if k in state
        }  # the run may have replaced its folder, and job.json with it
        job.write(**known, status=status, exit_code=code, error=error, seconds=state.get("seconds", 0.0) + seconds)
        return self.outcome(job)

    def outcome(self, job: SweepJob) -> Outcome:
        """Return the job's outcome as read from its folder."""
        state = job.read()
        status = state.get("status", "failed")
        objective = objective_in(measures_of(job.folder), self.metric) if status in DONE else None
        return Outcome(job, status, state.get("exit_code") or 0, objective)

    def write_table(self, status: str = "running", *, with_page: bool = True) -> dict[str, Any]:
        """Update sweep.json and (``with_page``) sweep.html; return the content of sweep.json."""
        fields = {"command": self.command_line, "metric": self.metric, "direction": self.direction, "status": status}
        return write(self.folder, **fields, with_page=with_page)

    @property
    def command_line(self) -> str:
        """Return the command that resumes this sweep."""
        sweep_dir = (
            []
            if any(w.startswith(("sweep_dir=", "hydra.sweep.dir=")) for w in self.command)
            else [f"sweep_dir={quoted(self.folder)}"]
        )
        return shlex.join(["python", "-m", "pretrain", *self.command, *sweep_dir])


def run_job(
    sweep: Sweep,
    overrides: list[str],
    *,
    stop_signals: list[str] | None = None,
    environment: dict[str, str] | None = None,
) -> Outcome:
    """Run one job in a new process and wait for it. A job that is done already is not run again.

    A job that fails has an exit code and no objective. If the job's ``prune_file`` appears, only this job is stopped.
    ``stop_signals`` is a list to which a caller that runs several jobs in threads can append the names of stop signals at any
    time. ``environment`` is added to the environment of the job.

    Raises ``Stopped`` if this process or the job's process got a stop signal.
    """
    if stop_signals:
        raise Stopped(stop_signals[0])
    stop_signals = [] if stop_signals is None else stop_signals
    job = sweep.job(overrides)
    with job.exclusive() as held:
        state = sweep.begin(job)
        if state["status"] in DONE:
            notice(f"{job.name}: already {state['status']}, not run again")
            return sweep.outcome(job)
        job.write(status="running", locked=True)
        notice(f"job {sweep.position(job)}: {job.name}")
        sweep.write_table()
        started_at = time.monotonic()
        process = subprocess.Popen(
            [*module_command("pretrain"), *sweep.arguments(job)],
            env=child.environment(job.error_file) | (environment or {}),
            pass_fds=held.descriptors,  # so that the job stays locked while its process lives, even if this process dies
        )
        # The job decides when it stops. A terminal sends Ctrl-C to the job too; the job ignores the second of the two signals.
        with collecting_stop_signals(
            stop_signals, lambda n: process.send_signal(signal.SIGTERM if n == signal.SIGINT else n)
        ):
            code = _wait(process, job, stop_signals)
        outcome = sweep.end(job, state, code, time.monotonic() - started_at)
    sweep.write_table(with_page=False)  # the page is drawn when the next job starts and when the sweep ends
    if outcome.status == "failed":
        notice(f"{job.name}: failed: {job.read()['error']}")
    if stop_signals or outcome.status == "stopped":
        raise Stopped(stop_signals[0] if stop_signals else f"{job.name} was stopped and has saved")
    return outcome


def _wait(process: subprocess.Popen[bytes], job: SweepJob, stop_signals: list[str]) -> int:
    """Return the exit code of the process, or 128 + the signal that killed it, as a shell does."""
    terminated = False
    while True:
        try:
            code = process.wait(CHECK_SECONDS)
        except subprocess.TimeoutExpired:
            if not terminated and (stop_signals or job.prune_file.exists()):
                terminated = True
                process.terminate()
        else:
            return code if code >= 0 else EXIT_CODE if -code == signal.SIGTERM else 128 - code


@contextmanager
def collecting_stop_signals(
    stop_signals: list[str], pass_on: Callable[[int], None] = lambda number: None
) -> Iterator[None]:
    """Handle stop signals in the body of the ``with`` statement: append their names to ``stop_signals`` and call ``pass_on``.
    In any thread but the main one this does nothing, because Python delivers signals to the main thread only."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop_signals.append(signal.Signals(number).name)
        pass_on(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(job: SweepJob, code: int) -> str:
    if job.error_file.exists():
        return job.error_file.read_text().removeprefix("error: ")
    if code > 128:
        name = signal.Signals(code - 128).name if code - 128 in list(signal.Signals) else str(code - 128)
        return f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")
    return f"exit code {code}"


def quoted(path: Path) -> str:
    """Return a path as a value that Hydra's override grammar parses as that path."""
    return str(path) if re.fullmatch(r"[\w./-]+", str(path), re.ASCII) else quoting.quoted(str(path))
