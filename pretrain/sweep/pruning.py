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

LOOK_SECONDS = 0.5


@contextmanager
def pruning(trials: dict[SweepJob, Trial], metric: str) -> Iterator[None]:
    """In the body of the ``with`` statement, report every evaluation of the running ``trials`` to the study, and stop the
    trials that its pruner rejects."""
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(trials, metric, over), name="pruning", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def _watch(trials: dict[SweepJob, Trial], metric: str, over: threading.Event) -> None:
    reported: dict[SweepJob, set[int]] = {job: set() for job in trials}
    seen: dict[SweepJob, int] = {}
    given_up: set[SweepJob] = set()
    while not over.wait(LOOK_SECONDS):
        for job, trial in trials.items():
            state = job.read()
            if state.get("status") != "running" or not state.get("locked"):  # no process on this machine waits for it
                continue
            if job not in given_up and evaluated_since(job, seen) and _looks_bad(job, trial, metric, reported[job]):
                given_up.add(job)
                notice(f"{job.name}: worse than the median at step {max(reported[job])}; pruned")
            if job in given_up:  # at every check, because a job that starts deletes the file of an earlier attempt
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


def _looks_bad(job: SweepJob, trial: Trial, metric: str, reported: set[int]) -> bool:
    """Report new evaluations to the study and return whether its pruner rejects the trial."""
    for step, value in objectives(job.folder, metric).items():
        if step in reported:
            continue
        reported.add(step)
        trial.report(value, step)  # Optuna keeps the value of a step that an earlier process reported
        if trial.should_prune():
            return True
    return False
