"""`hydra/launcher=slurm`: every job of a sweep becomes a SLURM job that survives preemption and its time limit.

submitit writes the sbatch script, catches SLURM's warning signal and queues the job again. The job itself is the same
command line in a fresh process, so whatever stops and continues a run in a terminal does so here.
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
from pretrain.runtime.folders import check_private, make_folder
from pretrain.runtime.python import module_command
from pretrain.runtime.safe_files import own_folder
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
    """The keys of conf/hydra/launcher/slurm.yaml, which says what each is for."""

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
        check_options("hydra.launcher", self)
        if re.search(r"[\x00-\x1f\x7f%]", self.folder):  # a line of its own would be one of the batch script
            raise UserError(f"hydra.launcher.folder={self.folder!r}: SLURM takes no line end and no % in a path")
        if self.cluster == "local" and self.nodes > 1:
            raise UserError(f"hydra.launcher.nodes={self.nodes}: cluster=local is one node, this machine")

    def for_submitit(self) -> dict[str, Any]:
        srun = ["--kill-on-bad-exit=1"]  # a node that failed ends the others
        if self.cpus_per_task:  # since 22.05 srun does not take it over from sbatch
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
    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. ``task_function``: the `Sweep`; it is not called, what SLURM runs are its jobs' commands."""
        self.options.check()
        assert isinstance(task_function, Sweep)
        self.hydra_context = hydra_context
        self.sweep = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs that are not done, wait for them, return the objectives; a job that fails stops no other."""
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
        return [*module_command("pretrain"), *self.sweep.words(job)]

    def _run(self, callables: dict[str, SlurmJob]) -> None:
        """Raises ``Stopped`` when a signal ends the waiting: SLURM's jobs stay, those of this machine save and end."""
        started_at = time.monotonic()
        jobs = self._submit(callables)

        def write_down(name: str, code: int) -> None:
            own = callables[name].of
            assert own is not None
            self.sweep.end(own, own.read(), code, time.monotonic() - started_at)
            self.sweep.write_table()

        left = dict(jobs)
        try:
            for name, code in self._wait(jobs):
                write_down(name, code)
                del left[name]
        except (KeyboardInterrupt, Stopped):
            if self.options.cluster == "slurm":
                ids = " ".join(job.job_id for job in jobs.values())
                notice(f"no longer waiting; the jobs go on. To cancel them: scancel {ids}")
            else:
                for name, code in self._wait(
                    left, stop=True
                ):  # one that a Ctrl-C of the terminal has ended left no result
                    write_down(name, code and EXIT_CODE)
            raise

    def _submit(self, callables: dict[str, SlurmJob]) -> dict[str, submitit.Job[int]]:
        """Raises ``UserError`` where there is no SLURM, or where it refuses the jobs."""
        try:
            import submitit
        except ImportError:
            raise UserError("hydra/launcher=slurm needs submitit: pip install 'pretrain[slurm]'") from None
        cluster, requeues = self.options.cluster, self.options.max_requeues
        if cluster == "slurm" and shutil.which("srun") is None:
            raise UserError("hydra/launcher=slurm: no srun on this machine; hydra.launcher.cluster=local does without")
        folder = fresh_folder(self.options.folder)
        executor = submitit.AutoExecutor(folder, cluster, **{f"{cluster}_max_num_timeout": requeues})
        try:
            executor.update_parameters(**self.options.for_submitit())
            with executor.batch():
                jobs = {name: executor.submit(job) for name, job in callables.items()}
        except submitit.core.utils.FailedJobError:  # submitit has passed on what sbatch said
            raise UserError(
                "sbatch did not take the jobs, for the reason above; hydra.launcher.* are its options"
            ) from None
        ids = " ".join(job.job_id for job in jobs.values())
        leaving = "; Ctrl-C only ends this waiting" if cluster == "slurm" else ""
        notice(f"submitted {ids}; logs in {folder}{leaving}")
        return jobs

    def _wait(self, jobs: dict[str, submitit.Job[int]], *, stop: bool = False) -> Iterator[tuple[str, int]]:
        """The name and the exit code of each job, and a line, when it is over. ``stop``: ask them to, until they are.

        A job is over when it has left a result, or when the queue has twice not shown it any more; the second look
        gives a shared file system the time to show the result.
        """
        codes: dict[str, int] = {}
        live = before = {job.job_id for job in jobs.values()}
        for second in itertools.count():
            if stop:
                _ask_to_stop(job for name, job in jobs.items() if name not in codes)
            if second % QUEUE_SECONDS == 0:
                live, before = self._live(jobs.values()), live
            for name, job in jobs.items():
                code = None if name in codes else _result(job, live=job.job_id in live | before)
                if code is not None:
                    codes[name] = code
                    notice(f"job {job.job_id} ({name}): {_how(code, job.task(0).paths.stdout)}")
                    yield name, code
            if len(codes) == len(jobs):
                break
            time.sleep(1)

    def _live(self, jobs: Iterable[submitit.Job[int]]) -> set[str]:
        """Ids of the jobs that are queued or running. squeue needs no accounting database, as sacct does."""
        if self.options.cluster == "local":
            return {job.job_id for job in jobs if not job.done()}
        command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
        queue = subprocess.run(command, capture_output=True, text=True, check=False)
        if queue.returncode:  # the controller is busy or restarting: no news
            return {job.job_id for job in jobs}
        return set(queue.stdout.split())


def fresh_folder(parent: str) -> Path:
    """A new folder in ``parent``, for this user alone and of a name that nobody knows before: submitit unpickles what it
    finds there under the number of a job, and a sweep's folder may have come with somebody else's files.

    Raises ``UserError`` where it can't be made.
    """
    place = Path(os.path.expanduser(parent))
    try:
        make_folder(place.parent)
        check_private(own_folder(place), "hydra.launcher.folder")
        return Path(tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d_%H-%M-%S_"), dir=place)).absolute()
    except OSError as error:
        raise UserError(f"hydra.launcher.folder={parent}: can't be written: {error.strerror}") from None


def _ask_to_stop(jobs: Iterable[submitit.Job[int]]) -> None:
    """Of jobs that are processes of this machine: each is called by the number of its controller, which passes it on.
    Again and again: submitit ignores it while a job is starting, a command hears it once."""
    for job in jobs:
        with suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)


def _result(job: submitit.Job[int], *, live: bool) -> int | None:
    """The exit code of a job that is over. The first node speaks for all; 1 where there is no result, or an exception."""
    import submitit

    first = job.task(0)
    if not first.paths.result_pickle.exists():
        return None if live else 1
    try:
        code = first.result()
    except submitit.core.utils.FailedJobError as error:
        code = EXIT_CODE if "timed-out too many times" in str(error) else 1  # max_requeues; it has saved
    return None if live and code == EXIT_CODE else code  # one that was stopped may be queued again


def _how(code: int, log: Path) -> str:
    if code == 0:
        return "done"
    return f"exit code {code}, see {log}" if log.exists() else "ended before it could start"


@dataclass
class SlurmJob:
    """What submitit pickles and calls in SLURM's job, once on each node: the command, as a child process.

    Everything that waits for the child leaves it unreaped (``WNOWAIT``): the signal handler of submitit calls
    ``checkpoint`` in the middle of ``__call__``, and both have to see the exit code.
    """

    command: list[str]
    folder: Path
    of: JobOfSweep | None = None
    pid: int = 0

    def __call__(self) -> int:
        import submitit

        command = [*self.command, *_meeting_point()]
        environment = None
        if self.of is not None:
            if submitit.JobEnvironment().global_rank == 0:  # one node speaks for all
                self.of.write(status="running", locked=False)
            environment = child.environment(self.of.note)
        if submitit.JobEnvironment().cluster == "local":  # SLURM's reaches the command by itself
            signal.signal(signal.SIGTERM, self._pass_on)
        process = subprocess.Popen(command, cwd=self.folder, env=environment, preexec_fn=_ignore_warning_signal)
        self.pid = process.pid
        code = _exit_code(self.pid)
        if code not in (0, EXIT_CODE):
            atexit.register(os._exit, code)  # once submitit has written the result: SLURM too sees a failed job
        return code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self.pid:
            os.kill(self.pid, number)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission | None:
        """SLURM will end the job soon: let the command save, then have it queued again; not if it failed."""
        import submitit

        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            if _exit_code(self.pid) not in (0, EXIT_CODE):
                return None
        return submitit.helpers.DelayedSubmission(SlurmJob(self.command, self.folder, self.of))


def _ignore_warning_signal() -> None:
    """SLURM sends its warning to every process of the job; submitit passes it on to the command as a SIGTERM."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _exit_code(pid: int) -> int:
    """Wait for a child; 128 + the signal that killed it, as shells say it.

    Killed by SIGTERM means stopped: the signal came before the command listened to it, or after its work was done.
    """
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert end is not None
    if end.si_code == os.CLD_EXITED:
        return end.si_status
    return EXIT_CODE if end.si_status == signal.SIGTERM else 128 + end.si_status


def _meeting_point() -> list[str]:
    """In a job of several nodes, the overrides by which their commands find each other: the first node and a port.

    ``NodeAddr`` is the name or address by which SLURM itself reaches the node.
    """
    import submitit

    job = submitit.JobEnvironment()
    if job.num_nodes == 1:
        return []
    node = subprocess.check_output(["scontrol", "show", "node", job.hostnames[0]], text=True)
    address = re.search(r"NodeAddr=(\S+)", node)
    assert address is not None, node
    port = 10_000 + int(job.raw_job_id) % 20_000  # below the ports that Linux gives out by itself
    return [f"launch.nodes={job.num_nodes}", f"launch.endpoint='{address[1]}:{port}'"]
