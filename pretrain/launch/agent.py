"""Start and supervise the local workers with torch's elastic agent.

The agent starts the workers, joins the agents of other nodes, forwards stop signals, ends all workers when one of them
dies, restarts them up to ``launch.max_restarts`` times, and reports the cause of a failure once. Workers are forked from a
server process that imports torch while this process still checks the command.
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
    from pretrain.distributed.topology import Topology
    from pretrain.launch.config import LaunchConfig


def run_workers(config: dict[str, Any], overrides: list[str], topology: Topology, policy: LaunchConfig) -> int:
    """Prepare the data, then train in ``topology.workers_per_node`` processes on this machine; return the exit code.

    Raises ``UserError`` for a mistake that a worker found, and ``WorkersFailed`` when the workers failed and no restart is
    left.
    """
    check_place_for_sockets()
    check_semaphores()
    warm_up()
    meeting = _rendezvous_arguments(policy, topology.device_type)
    with tempfile.TemporaryDirectory(prefix="pretrain-") as reports:
        job = WorkerJob(config, overrides, topology, reports, dict(os.environ), os.getcwd())
        _wait_for_data(job)
        codes = _run_agent(job, topology.workers_per_node, policy, meeting)
    return next((code for code in codes if code), 0)


def _wait_for_data(job: WorkerJob) -> None:
    """Tokenize the text that is not in the cache yet, in a child of the fork server, which has the needed imports.

    Raises ``UserError``, ``Stopped`` or ``WorkersFailed``, by how that process ended.
    """
    from pretrain.launch import elastic  # noqa: F401 (torch's agent, while the server imports: start() waits for it)

    process = multiprocessing.get_context("forkserver").Process(target=prepare_data, args=(job,))
    process.start()
    try:
        while process.exitcode is None:
            process.join(SIGNAL_POLL_SECONDS)
    finally:  # a signal may have interrupted the wait
        process.terminate()
        process.join()
    if process.exitcode == EXIT_CODE:
        raise Stopped("while preparing the data")
    if process.exitcode:
        report = next(read_reports(Path(job.reports)), None)
        if report is not None and report.is_mistake:
            raise UserError(report.message)
        raise WorkersFailed(
            report.trace if report else f"the process that prepared the data exited with code {process.exitcode}"
        )


def _rendezvous_arguments(policy: LaunchConfig, device_type: str) -> dict[str, Any]:
    """Return the arguments of `pretrain.launch.rendezvous.meet` for a run on several nodes; empty for a single node.

    Raises ``UserError`` for an endpoint that can't be used, before any data is read.
    """
    if policy.nodes == 1:
        return {}
    assert policy.endpoint is not None
    # torch compares host names to decide whether this machine is the host; a name need not resolve to the given address
    found = {"is_host": is_here(policy.endpoint), "local_address": own_address(policy.endpoint)}
    check_interfaces(split(policy.endpoint)[0], device_type)
    notice(f"meeting {policy.nodes} nodes at {policy.endpoint}")
    return {"endpoint": policy.endpoint, "nodes": policy.nodes, "timeout_seconds": policy.timeout} | found


def check_semaphores() -> None:
    """Raise ``UserError`` where no semaphore can be created in /dev/shm; returning the workers' results needs some."""
    try:
        multiprocessing.get_context("forkserver").Lock()
    except OSError as error:
        raise UserError(
            f"several processes need shared memory: {error.strerror or error}; mount a tmpfs at /dev/shm that you can write "
            "(docker run --ipc=host or --shm-size=1g), or use one process: strategy=single"
        ) from None


def warm_up() -> None:
    """Start the server from which workers are forked; it imports what they need while this process continues."""
    # Without this, torch.cuda.is_available() initializes CUDA, and a process with CUDA initialized can't be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pretrain.launch.preload"])
    for module in (multiprocessing.resource_tracker, multiprocessing.forkserver):  # the former unblocks
        with signals_blocked():  # workers inherit the mask, and unblock signals once their handlers are installed
            module.ensure_running()


def _run_agent(job: WorkerJob, workers: int, policy: LaunchConfig, meeting: dict[str, Any]) -> list[int]:
    """Run the agent to its end and return the workers' exit codes."""
    # If all attempts shared one store, they would share its port, and a restart would hang.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    from pretrain.launch.elastic import Agent
    from pretrain.launch.rendezvous import SingleAgentRendezvous, meet

    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn", "torchelastic-events-null"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # this program reports the cause itself, once
    spec = WorkerSpec(
        role="pretrain",
        local_world_size=workers,
        entrypoint=work,
        args=(job,),
        rdzv_handler=meet(**meeting) if meeting else SingleAgentRendezvous(uuid.uuid4().hex),
        max_restarts=policy.max_restarts,
        monitor_interval=0.05,
    )
    logs = DefaultLogsSpecs(log_dir=f"{job.reports}/elastic")
    agent = Agent(spec, logs_specs=logs, start_method="forkserver", reports=Path(job.reports))
    return agent.outcome(Path(job.config["output_dir"]))
