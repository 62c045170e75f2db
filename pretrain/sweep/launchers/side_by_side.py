"""`hydra/launcher=joblib`: run the jobs of a sweep in parallel on this machine.

A job is a process already, so this launcher needs only a thread that waits for each job. Hydra's plugin of that name starts a
second process around each job. A signal then ends the sweep but not these processes, so that their jobs continue, and the
GPUs are not divided among the jobs.
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
from pretrain.sweep.jobs import Sweep, collecting_stop_signals, run_job


class SideBySideLauncher(Launcher):
    """A launcher that runs ``n_jobs`` jobs at a time."""

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. Raises ``UserError`` if there are fewer GPUs than jobs at a time."""
        check_value("hydra.launcher.n_jobs", self.n_jobs, PositiveInt)
        self.sweep = cast(Sweep, task_function)
        self.shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for share in shares(_gpus(), self.n_jobs):
            self.shares.put({"CUDA_VISIBLE_DEVICES": ",".join(share)} if share else {})

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return their objectives. A job that fails does not stop the others.

        Raises ``Stopped`` after a stop signal, or if a job was stopped. The other jobs have then saved and stopped too.
        """
        stop_signals: list[str] = []
        with collecting_stop_signals(stop_signals), ThreadPoolExecutor(self.n_jobs) as pool:
            futures = [pool.submit(self._run, list(overrides), stop_signals) for overrides in job_overrides]
            while wait(futures, SIGNAL_POLL_SECONDS).not_done:
                pass
        if stop_signals:
            raise Stopped(stop_signals[0])
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=future.result()) for future in futures]

    def _run(self, overrides: list[str], stop_signals: list[str]) -> float | None:
        share = self.shares.get()
        try:
            return run_job(self.sweep, overrides, stop_signals=stop_signals, environment=share).objective
        except Stopped as stop:  # if one job is stopped, all others stop too
            stop_signals.append(str(stop))
            raise
        finally:
            self.shares.put(share)


def shares(gpus: list[str], n_jobs: int) -> list[list[str]]:
    """Divide ``gpus`` into ``n_jobs`` equal shares of neighbouring GPUs; the shares are empty if there are no GPUs.

    Raises ``UserError`` if there are fewer GPUs than jobs.
    """
    each = len(gpus) // n_jobs
    if gpus and not each:
        raise UserError(f"hydra.launcher.n_jobs={n_jobs}: a job needs a GPU of its own, and there are {len(gpus)}")
    return [gpus[i * each : (i + 1) * each] for i in range(n_jobs)]


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not gpu_visible():
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
