"""Stop trials early that are bad at an evaluation (pruning).

A launcher runs the jobs elsewhere. This module reads their metrics.jsonl and requests a stop with a file, so that launchers
need no support for pruning. This process and the process that waits for the job must both have access to these files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pretrain.runtime.console import notice
from pretrain.sweep.job import SweepJob
from pretrain.sweep.measure import objectives

if TYPE_CHECKING:
    from optuna.trial import Trial

CHECK_SECONDS = 0.5


@contextmanager
def pruning(trials: dict[SweepJob, Trial], metric: str) -> Iterator[None]:
    """In the body of the ``with`` statement, report every evaluation of the running ``trials`` to the study, and stop the
    trials that its pruner rejects."""
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(trials, metric, done), name="pruning", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def _watch(trials: dict[SweepJob, Trial], metric: str, done: threading.Event) -> None:
    reported: dict[SweepJob, set[int]] = {job: set() for job in trials}
    seen: dict[SweepJob, int] = {}
    rejected: set[SweepJob] = set()
    while not done.wait(CHECK_SECONDS):
        for job, trial in trials.items():
            state = job.read()
            if state.get("status") != "running" or not state.get("locked"):  # no process on this machine waits for it
                continue
            if job not in rejected and evaluated_since(job, seen) and _should_prune(job, trial, metric, reported[job]):
                rejected.add(job)
                notice(f"{job.name}: worse than the median at step {max(reported[job])}; pruned")
            if job in rejected:  # at every check, because a job that starts deletes the file of an earlier attempt
                job.prune_file.touch()


def evaluated_since(job: SweepJob, seen: dict[SweepJob, int]) -> bool:
    """Return whether there may be a new evaluation since the last call. ``seen`` keeps the modification time of run.json,
    which is written right after the records of each evaluation; metrics.jsonl can be long, so it is read only if needed."""
    try:
        written_at = (job.folder / "run.json").stat().st_mtime_ns
    except OSError:
        return False
    known = seen.get(job)
    seen[job] = written_at
    return written_at != known


def _should_prune(job: SweepJob, trial: Trial, metric: str, reported: set[int]) -> bool:
    """Report new evaluations to the study and return whether its pruner rejects the trial."""
    for step, value in objectives(job.folder, metric).items():
        if step in reported:
            continue
        reported.add(step)
        trial.report(value, step)  # Optuna keeps the value of a step that an earlier process reported
        if trial.should_prune():
            return True
    return False
