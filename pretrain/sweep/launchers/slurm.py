"""`hydra/launcher=slurm`: submit every job of a sweep as a SLURM job that is requeued after preemption or its time limit.

submitit writes the sbatch script, handles SLURM's warning signal and requeues the job. The job itself is the same command
line in a new process, so it stops and resumes in the same way as a run in a terminal.
"""

from __future__ import annotations

import atexit
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from pretrain.config.check import check_options
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import make_folder, own_folder
from pretrain.runtime.folders import check_private
from pretrain.runtime.python import module_command
from pretrain.runtime.signals import EXIT_CODE, Stopped
from pretrain.sweep import child
from pretrain.sweep.job import DONE
from pretrain.sweep.job import SweepJob as JobOfSweep
from pretrain.sweep.jobs import Sweep

if TYPE_CHECKING:
    import submitit

QUEUE_SECONDS = 30


@dataclass(frozen=True)
class Options:
    """The options of the launcher.

    Attributes:
        cluster: ``slurm``, or ``local`` for processes on this machine.
        name: Name of the jobs in squeue.
        nodes: Nodes per job; each node runs the command once.
        gpus_per_node: GPUs per node; ``None`` is the default of the partition, or none with ``cluster=local``.
        cpus_per_task: CPU cores per node.
        mem_gb: Memory per node in GB.
        timeout_min: Time limit of a submission in minutes.
        signal_seconds: Seconds before the time limit at which a job receives the signal to save.
        max_requeues: Number of times that a job may reach its time limit; preemptions are not counted.
        partition: Partition of the jobs; ``None`` is SLURM's default.
        account: Account to which the jobs are charged; ``None`` is SLURM's default.
        qos: Quality of service; ``None`` is SLURM's default.
        array_parallelism: Maximum number of the sweep's jobs that run at the same time.
        setup: Shell lines that run before the command.
        additional_parameters: Other options of sbatch.
        folder: Parent of the folders for logs and submitit's files; it has the same path on every node.
    """

    cluster: Literal["slurm", "local"]
    name: str
    nodes: PositiveInt
    gpus_per_node: NonNegativeInt | None
    cpus_per_task: PositiveInt | None
    mem_gb: PositiveInt | PositiveFloat | None
    timeout_min: PositiveInt
    signal_seconds: NonNegativeInt
    max_requeues: NonNegativeInt
    partition: str | None
    account: str | None
    qos: str | None
    array_parallelism: PositiveInt
    setup: list[str]
    additional_parameters: dict[str, Any]
    folder: str

    def check(self) -> None:
        """Raise ``UserError`` for invalid options."""
        check_options("hydra.launcher", self)
        if re.search(r"[\x00-\x1f\x7f%]", self.folder):  # a line end would start a new line of the batch script
            raise UserError(f"hydra.launcher.folder={self.folder!r}: SLURM does not accept a line end or % in a path")
        if self.cluster == "local" and self.nodes > 1:
            raise UserError(f"hydra.launcher.nodes={self.nodes}: cluster=local runs on one node, this machine")

    def for_submitit(self) -> dict[str, Any]:
        """Return the options as parameters of submitit's executor."""
        srun = ["--kill-on-bad-exit=1"]  # if one node fails, end the others
        if self.cpus_per_task:  # since SLURM 22.05 srun does not inherit it from sbatch
            srun.append(f"--cpus-per-task={self.cpus_per_task}")
        same = ("name", "nodes", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")
        return {
            **{key: getattr(self, key) for key in same},
            "tasks_per_node": 1,
            "stderr_to_stdout": True,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_signal_delay_s": self.signal_seconds,
            "slurm_array_parallelism": self.array_parallelism,
            "slurm_additional_parameters": {"requeue": True, **self.additional_parameters},
            "slurm_srun_args": srun,
            f"{self.cluster}_setup": self.setup or None,
        }


class SlurmLauncher(Launcher):
    """A launcher that submits the jobs to SLURM, or runs them on this machine with ``cluster=local``, and waits for them."""

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. ``task_function`` is the `Sweep`. It is not called, because SLURM runs the commands of its jobs."""
        self.options.check()
        assert isinstance(task_function, Sweep)
        self.hydra_context = hydra_context
        self.sweep = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs that are not done, wait for them, and return the objectives. A job that fails does not stop the
        others."""
        known: dict[str, JobOfSweep] = {}
        callables = {}
        for overrides in job_overrides:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            job = self.sweep.job(list(config.hydra.overrides.task))
            known[job.name] = job
            if self.sweep.begin(job)["status"] not in DONE:
                callables[job.name] = SlurmJob(self._command(job), Path.cwd(), job)
        if callables:
            self._run(callables)
        objectives = [self.sweep.outcome(job).objective for job in known.values()]
        values = [math.nan if value is None else value for value in objectives]
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=value) for value in values]

    def _command(self, job: JobOfSweep) -> list[str]:
        return [*module_command("pretrain"), *self.sweep.arguments(job)]

    def _run(self, callables: dict[str, SlurmJob]) -> None:
        """Submit the jobs and wait for them.

        Raises ``Stopped`` if a signal ends the waiting. Jobs in SLURM's queue then continue; jobs on this machine save and
        exit."""
        started_at = time.monotonic()
        jobs = self._submit(callables)

        def record_end(name: str, code: int) -> None:
            own = callables[name].sweep_job
            assert own is not None
            self.sweep.end(own, own.read(), code, time.monotonic() - started_at)
            self.sweep.write_table()

        remaining = dict(jobs)
        try:
            for name, code in self._wait(jobs):
                record_end(name, code)
                del remaining[name]
        except (KeyboardInterrupt, Stopped):
            if self.options.cluster == "slurm":
                ids = " ".join(job.job_id for job in jobs.values())
                notice(f"no longer waiting; the jobs continue. To cancel them: scancel {ids}")
            else:
                # a job that a Ctrl-C of the terminal has ended left no result
                for name, code in self._wait(remaining, stop=True):
                    record_end(name, code and EXIT_CODE)
            raise

    def _submit(self, callables: dict[str, SlurmJob]) -> dict[str, submitit.Job[int]]:
        """Submit the jobs. Raises ``UserError`` if SLURM is missing or rejects them."""
        try:
            import submitit
        except ImportError:
            raise UserError("hydra/launcher=slurm needs submitit: pip install 'pretrain[slurm]'") from None
        cluster, requeues = self.options.cluster, self.options.max_requeues
        if cluster == "slurm" and shutil.which("srun") is None:
            raise UserError(
                "hydra/launcher=slurm: no srun on this machine; hydra.launcher.cluster=local does not need it"
            )
        folder = fresh_folder(self.options.folder)
        executor = submitit.AutoExecutor(folder, cluster, **{f"{cluster}_max_num_timeout": requeues})
        try:
            executor.update_parameters(**self.options.for_submitit())
            with executor.batch():
                jobs = {name: executor.submit(job) for name, job in callables.items()}
        except submitit.core.utils.FailedJobError:  # submitit has printed the message of sbatch
            raise UserError(
                "sbatch rejected the jobs for the reason above; hydra.launcher.* sets its options"
            ) from None
        ids = " ".join(job.job_id for job in jobs.values())
        hint = "; Ctrl-C ends only the waiting" if cluster == "slurm" else ""
        notice(f"submitted {ids}; logs in {folder}{hint}")
        return jobs

    def _wait(self, jobs: dict[str, submitit.Job[int]], *, stop: bool = False) -> Iterator[tuple[str, int]]:
        """Yield the name and the exit code of each job when it has ended, and print a notice. With ``stop`` send the jobs a
        stop signal until they end.

        A job has ended when its result exists, or when it is missing in the queue at two checks; the second check gives a
        shared file system time to show the result.
        """
        codes: dict[str, int] = {}
        live = before = {job.job_id for job in jobs.values()}
        for second in itertools.count():
            if stop:
                _send_stop_signal(job for name, job in jobs.items() if name not in codes)
            if second % QUEUE_SECONDS == 0:
                live, before = self._live(jobs.values()), live
            for name, job in jobs.items():
                code = None if name in codes else _result(job, live=job.job_id in live | before)
                if code is not None:
                    codes[name] = code
                    notice(f"job {job.job_id} ({name}): {_exit_description(code, job.task(0).paths.stdout)}")
                    yield name, code
            if len(codes) == len(jobs):
                break
            time.sleep(1)

    def _live(self, jobs: Iterable[submitit.Job[int]]) -> set[str]:
        """Return the ids of the jobs that are queued or running. squeue, unlike sacct, needs no accounting database."""
        if self.options.cluster == "local":
            return {job.job_id for job in jobs if not job.done()}
        command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
        queue = subprocess.run(command, capture_output=True, text=True, check=False)
        if queue.returncode:  # the controller is busy or restarting: assume that nothing changed
            return {job.job_id for job in jobs}
        return set(queue.stdout.split())


def fresh_folder(parent: str) -> Path:
    """Create a new folder in ``parent`` with an unpredictable name, accessible to this user only.

    submitit unpickles the files that it finds there under a job's number, and the folder of a sweep may contain files of
    another user.

    Raises ``UserError`` if the folder can't be created.
    """
    place = Path(os.path.expanduser(parent))
    try:
        make_folder(place.parent)
        check_private(own_folder(place), "hydra.launcher.folder")
        return Path(tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d_%H-%M-%S_"), dir=place)).absolute()
    except OSError as error:
        raise UserError(f"hydra.launcher.folder={parent}: can't be written: {error.strerror}") from None


def _send_stop_signal(jobs: Iterable[submitit.Job[int]]) -> None:
    """Send SIGTERM to the jobs, which are processes on this machine: a job's id is the pid of its controller, which forwards
    the signal. The caller repeats this, because submitit ignores the signal while a job is starting; a command acts on it
    once."""
    for job in jobs:
        with suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)


def _result(job: submitit.Job[int], *, live: bool) -> int | None:
    """Return the exit code of a job that has ended, else ``None``. The result of the first node counts; the code is 1 if the
    result is missing or is an exception."""
    import submitit

    first = job.task(0)
    if not first.paths.result_pickle.exists():
        return None if live else 1
    try:
        code = first.result()
    except submitit.core.utils.FailedJobError as error:
        code = (
            EXIT_CODE if "timed-out too many times" in str(error) else 1
        )  # max_requeues was reached; the job has saved
    return None if live and code == EXIT_CODE else code  # a job that was stopped may be requeued


def _exit_description(code: int, log: Path) -> str:
    if code == 0:
        return "done"
    return f"exit code {code}, see {log}" if log.exists() else "ended before the command started"


@dataclass
class SlurmJob:
    """The callable that submitit pickles and calls in SLURM's job, once per node. It runs the command as a child process.

    Waiting for the child never reaps it (``WNOWAIT``), because submitit's signal handler calls ``checkpoint`` in the middle of
    ``__call__``, and both need the exit code.
    """

    command: list[str]
    folder: Path
    sweep_job: JobOfSweep | None = None
    pid: int = 0

    def __call__(self) -> int:
        import submitit

        command = [*self.command, *_rendezvous_overrides()]
        environment = None
        if self.sweep_job is not None:
            if submitit.JobEnvironment().global_rank == 0:  # only the first node writes the state
                self.sweep_job.write(status="running", locked=False)
            environment = child.environment(self.sweep_job.error_file)
        if submitit.JobEnvironment().cluster == "local":  # SLURM itself sends the signal to the command
            signal.signal(signal.SIGTERM, self._pass_on)
        process = subprocess.Popen(command, cwd=self.folder, env=environment, preexec_fn=_ignore_warning_signal)
        self.pid = process.pid
        code = _exit_code(self.pid)
        if code not in (0, EXIT_CODE):
            atexit.register(
                os._exit, code
            )  # exit after submitit has written the result, so that SLURM shows a failed job too
        return code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.pid:
            os.kill(self.pid, number)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission | None:
        """Called before SLURM ends the job: let the command save, then requeue the job unless the command failed."""
        import submitit

        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            if _exit_code(self.pid) not in (0, EXIT_CODE):
                return None
        return submitit.helpers.DelayedSubmission(SlurmJob(self.command, self.folder, self.sweep_job))


def _ignore_warning_signal() -> None:
    """Ignore SLURM's warning signal, which every process of the job receives. submitit forwards it to the command as
    SIGTERM."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _exit_code(pid: int) -> int:
    """Wait for a child and return its exit code, or 128 + the signal that killed it, as a shell does.

    A child that SIGTERM killed counts as stopped: the signal arrived before the command had installed its handler, or after
    its work was done.
    """
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert end is not None
    if end.si_code == os.CLD_EXITED:
        return end.si_status
    return EXIT_CODE if end.si_status == signal.SIGTERM else 128 + end.si_status


def _rendezvous_overrides() -> list[str]:
    """Return the overrides for the rendezvous of a job with several nodes: the first node's address and a port.

    ``NodeAddr`` is the name or address by which SLURM itself reaches the node.
    """
    import submitit

    job = submitit.JobEnvironment()
    if job.num_nodes == 1:
        return []
    node = subprocess.check_output(["scontrol", "show", "node", job.hostnames[0]], text=True)
    address = re.search(r"NodeAddr=(\S+)", node)
    assert address is not None, node
    port = 10_000 + int(job.raw_job_id) % 20_000  # below Linux's ephemeral ports
    return [f"launch.nodes={job.num_nodes}", f"launch.endpoint='{address[1]}:{port}'"]
