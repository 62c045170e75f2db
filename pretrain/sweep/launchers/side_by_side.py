"""`hydra/launcher=joblib`: the jobs of a sweep side by side on this machine.

A job is a process already, so a thread that waits for each is all it takes. Hydra's plugin of that name puts a second
process around each: a signal ends the sweep and leaves these behind, with jobs that go on, and no job knows which GPUs are
another's.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from pydantic import PositiveInt

from pretrain.config.check import check_value, gpu_visible
from pretrain.runtime.errors import UserError
from pretrain.runtime.signals import SIGNAL_POLL_SECONDS, Stopped
from pretrain.sweep.jobs import Sweep, hearing, run_job


class SideBySideLauncher(Launcher):
    """``n_jobs``: how many at a time."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. Raises ``UserError`` when there are fewer GPUs than jobs at a time."""
        check_value("hydra.launcher.n_jobs", self.n_jobs, PositiveInt)
        self.sweep = cast(Sweep, task_function)
        self.shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for share in shares(_gpus(), self.n_jobs):
            self.shares.put({"CUDA_VISIBLE_DEVICES": ",".join(share)} if share else {})

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return their objectives; a job that fails stops no other.

        Raises ``Stopped`` when a signal came, or a job was stopped: the others are then stopped too, and have saved.
        """
        asked: list[str] = []
        with hearing(asked), ThreadPoolExecutor(self.n_jobs) as pool:
            futures = [pool.submit(self._run, list(overrides), asked) for overrides in job_overrides]
            while wait(futures, SIGNAL_POLL_SECONDS).not_done:
                pass
        if asked:
            raise Stopped(asked[0])
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=future.result()) for future in futures]

    def _run(self, overrides: list[str], asked: list[str]) -> float | None:
        share = self.shares.get()
        try:
            return run_job(self.sweep, overrides, asked=asked, environment=share).objective
        except Stopped as stop:  # of this job alone: all of them stop
            asked.append(str(stop))
            raise
        finally:
            self.shares.put(share)


def shares(gpus: list[str], n_jobs: int) -> list[list[str]]:
    """The GPUs of each of ``n_jobs`` places, neighbours together, as many for one as for another; none where there are none.

    Raises ``UserError`` when there are fewer GPUs than places.
    """
    each = len(gpus) // n_jobs
    if gpus and not each:
        raise UserError(f"hydra.launcher.n_jobs={n_jobs}: a job needs a GPU of its own, and there are {len(gpus)}")
    return [gpus[i * each : (i + 1) * each] for i in range(n_jobs)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    if not gpu_visible():
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
