"""The parent of local workers: torch's elastic agent, told how our runs end.

It starts the workers, meets the agents of other nodes, passes stop signals on, ends the whole group when one of it dies,
starts it again as often as asked, and says once what went wrong. Workers are forked from a server that has imported torch
once, while this process was still finding out what to do.
Source: https://docs.pytorch.org/docs/stable/elastic/agent.html
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.launch.failure import read_reports
from pretrain.launch.network import check_interfaces, is_here, own_address, split
from pretrain.launch.worker import WorkerJob, prepare_data, work
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, WorkersFailed
from pretrain.runtime.filesystem import check_place_for_sockets
from pretrain.runtime.signals import EXIT_CODE, SIGNAL_POLL_SECONDS, Stopped, signals_blocked

if TYPE_CHECKING:
    from pretrain.launch.config import LaunchConfig
    from pretrain.strategy.base import Setting


def run_workers(config: dict[str, Any], overrides: list[str], setting: Setting, policy: LaunchConfig) -> int:
    """Prepare the data, then train in ``setting.workers // setting.nodes`` processes; return the exit code.

    Raises ``UserError`` for a mistake that a worker found, ``WorkersFailed`` when the group failed for good.
    """
    check_place_for_sockets()
    check_semaphores()
    warm_up()
    meeting = _meeting(policy, setting.device_type)
    with tempfile.TemporaryDirectory(prefix="pretrain-") as reports:
        job = WorkerJob(config, overrides, setting, reports, dict(os.environ), os.getcwd())
        _wait_for_data(job)
        codes = _run_agent(job, setting.workers // setting.nodes, policy, meeting)
    return next((code for code in codes if code), 0)


def _wait_for_data(job: WorkerJob) -> None:
    """Tokenize what the cache does not hold yet, in a process of the warm server: this one imports too little for it.

    Raises ``UserError``, ``Stopped`` or ``WorkersFailed`` as that process did.
    """
    from pretrain.launch import elastic  # noqa: F401 (torch's agent, while the server imports: start() waits for it)

    process = multiprocessing.get_context("forkserver").Process(target=prepare_data, args=(job,))
    process.start()
    try:
        while process.exitcode is None:
            process.join(SIGNAL_POLL_SECONDS)
    finally:  # a signal has ended the waiting
        process.terminate()
        process.join()
    if process.exitcode == EXIT_CODE:
        raise Stopped("while preparing the data")
    if process.exitcode:
        report = next(read_reports(Path(job.reports)), None)
        if report is not None and report.is_mistake:
            raise UserError(report.message)
        raise WorkersFailed(report.trace if report else f"preparing the data left with exit code {process.exitcode}")


def _meeting(policy: LaunchConfig, device_type: str) -> dict[str, Any]:
    """Where this agent meets those of other nodes, as arguments of ``meeting.meet``; empty where there are none.

    Raises ``UserError`` for a place that can't be one, before any data is read.
    """
    if policy.nodes == 1:
        return {}
    assert policy.endpoint is not None
    # torch finds out by the host's name whether it is the host, which need not lead to the address that was given
    found = {"is_host": is_here(policy.endpoint), "local_address": own_address(policy.endpoint)}
    check_interfaces(split(policy.endpoint)[0], device_type)
    notice(f"meeting {policy.nodes} nodes at {policy.endpoint}")
    return {"endpoint": policy.endpoint, "nodes": policy.nodes, "timeout_seconds": policy.timeout} | found


def check_semaphores() -> None:
    """Raises ``UserError`` where processes can't have one, which lies in /dev/shm: the results of workers need some."""
    try:
        multiprocessing.get_context("forkserver").Lock()
    except OSError as error:
        raise UserError(
            f"several processes need shared memory: {error.strerror or error}; mount a tmpfs at /dev/shm that you can write "
            "(docker run --ipc=host or --shm-size=1g), or use one process: strategy=single"
        ) from None


def warm_up() -> None:
    """Start the server that workers are forked from: it imports what they need while this process goes on."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has asked CUDA can't be forked
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pretrain.launch.preload"])
    for module in (multiprocessing.resource_tracker, multiprocessing.forkserver):  # the former's start ends the holding
        with signals_blocked():  # a worker hears them when it knows what to do
            module.ensure_running()


def _run_agent(job: WorkerJob, workers: int, policy: LaunchConfig, meeting: dict[str, Any]) -> list[int]:
    """The workers' exit codes."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # attempts would share a port, and a restart hang
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    from pretrain.launch.elastic import Agent
    from pretrain.launch.rendezvous import Alone, meet

    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn", "torchelastic-events-null"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what happened is said by us, once
    spec = WorkerSpec(
        role="pretrain",
        local_world_size=workers,
        entrypoint=work,
        args=(job,),
        rdzv_handler=meet(**meeting) if meeting else Alone(uuid.uuid4().hex),
        max_restarts=policy.max_restarts,
        monitor_interval=0.05,
    )
    logs = DefaultLogsSpecs(log_dir=f"{job.reports}/elastic")
    agent = Agent(spec, logs_specs=logs, start_method="forkserver", reports=Path(job.reports))
    return agent.outcome(Path(job.config["output_dir"]))
