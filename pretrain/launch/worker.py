"""One worker process of a run: its log, its signal handlers, and how it exits."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from pretrain.config.schema import RunConfig
from pretrain.distributed.rank_info import RankInfo
from pretrain.distributed.topology import Topology
from pretrain.launch.failure import write_hang, write_report
from pretrain.run.prepare import prepare
from pretrain.runtime import garbage_collector as collector
from pretrain.runtime.console import capture_stderr, quiet_libraries
from pretrain.runtime.errors import UserError
from pretrain.runtime.signals import EXIT_CODE, SIGNALS, Interrupt, Stopped
from pretrain.runtime.streams import flush, make_nonblocking

FROM_AGENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class WorkerJob:
    """The arguments of a worker, which are sent to it as a pickle by its parent.

    Attributes:
        config: The config of the run as a plain dict.
        overrides: The words of the command line.
        topology: All processes of the run and their devices.
        reports: The folder in which a failing worker writes its report.
        environment: The parent's environment variables.
        folder: The parent's working directory.
    """

    config: dict[str, Any]
    overrides: list[str]
    topology: Topology
    reports: str
    environment: dict[str, str]
    folder: str


def prepare_data(job: WorkerJob) -> None:
    """Prepare the data before any worker exists. The process exits with 0, with 75 when stopped, or with 1 and a report."""
    _restore_parent_state(job)
    Interrupt().install()
    quiet_libraries()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        config = RunConfig.of(job.config)
        prepare(config, devices=job.topology.data_parallel_devices)
    except Stopped:
        os._exit(EXIT_CODE)
    except BaseException as error:
        write_report(Path(job.reports), 0, error)
        os._exit(1)
    flush()
    os._exit(0)  # skips the interpreter's slow shutdown, for which the parent would wait


def work(job: WorkerJob) -> int:
    """Train as one rank and return the exit code. A failing worker writes a report and exits at once with 1."""
    _restore_parent_state(job)
    rank = int(os.environ["RANK"])
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    run_id = os.environ["TORCHELASTIC_RUN_ID"]
    one_machine = job.topology.nodes == 1
    place = RankInfo(
        *(rank, int(os.environ["LOCAL_RANK"]), job.topology, restarts, run_id),
        store=f"{job.reports}/store-{restarts}" if one_machine else "",
        one_machine=one_machine,
        prepared=True,
    )
    capture_stderr(Path(job.reports) / f"rank-{rank}.stderr", keep_terminal=rank == 0)
    faulthandler.enable(2)  # writes the stacks to the log on a bus error or a segmentation fault
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # the parent sends it on a hang
    make_nonblocking()
    interrupt = Interrupt(silent=True)  # the parent reports the signal
    interrupt.defer_signals = True
    interrupt.install()
    for number in (signal.SIGINT, signal.SIGHUP):  # the parent receives the terminal's signals too, and forwards them
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        code = _train(job, interrupt, place)
    except BaseException as error:
        write_report(Path(job.reports), rank, error)
        flush()
        os._exit(1)
    flush()
    return code


def _restore_parent_state(job: WorkerJob) -> None:
    """Restore the parent's environment and working directory, which may have changed since the fork server started."""
    collector.collect_rarely()
    os.environ.update({k: v for k, v in job.environment.items() if k not in FROM_AGENT})
    os.chdir(job.folder)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _train(job: WorkerJob, interrupt: Interrupt, place: RankInfo) -> int:
    import torch

    from pretrain.run import tasks

    quiet_libraries()
    if (joined := int(os.environ["WORLD_SIZE"])) != job.topology.world_size:
        raise UserError(
            f"{joined} processes have joined, {job.topology.world_size} were expected: give all nodes the same number of devices"
        )
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // place.topology.workers_per_node))
    on_hang = partial(write_hang, Path(job.reports), place.rank)
    return tasks.pretraining(RunConfig.of(job.config), job.overrides, interrupt, place, on_hang)


def _exit_with_parent() -> None:
    """Exit as soon as the parent has ended, however it ended, so that no orphan remains."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
