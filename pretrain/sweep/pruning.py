"""Stops trials that look bad at an evaluation. The jobs run elsewhere, in a launcher's hands; what is known of them here is
their metrics.jsonl, and they are asked to stop by a file, so launchers need not know of it. The files have to be within
reach of this process and of the one that waits for the job."""

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
    """Meanwhile report every evaluation of the running ``trials``, and have those stopped that the pruner gives up."""
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
            if state.get("status") != "running" or not state.get("locked"):  # nobody on this machine waits for it
                continue
            if job not in given_up and evaluated_since(job, seen) and _looks_bad(job, trial, metric, reported[job]):
                given_up.add(job)
                notice(f"{job.name}: worse than the median at step {max(reported[job])}; pruned")
            if job in given_up:  # again at every look: a job that starts takes away what an earlier one has left
                job.prune_file.touch()


def evaluated_since(job: SweepJob, seen: dict[SweepJob, int]) -> bool:
    """Whether there may be an evaluation since the last look, of which ``seen`` keeps the time. metrics.jsonl can be long;
    run.json is written anew right after each evaluation's records."""
    try:
        written_at = (job.folder / "run.json").stat().st_mtime_ns
    except OSError:
        return False
    known = seen.get(job)
    seen[job] = written_at
    return written_at != known


def _looks_bad(job: SweepJob, trial: Trial, metric: str, reported: set[int]) -> bool:
    """Report what is new and say whether the pruner gives the trial up."""
    for step, value in objectives(job.folder, metric).items():
        if step in reported:
            continue
        reported.add(step)
        trial.report(value, step)  # a step that an earlier process reported keeps its value
        if trial.should_prune():
            return True
    return False
