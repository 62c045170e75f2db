"""The parent of local workers: torch's elastic agent, told how our runs end.

It starts the workers, meets the agents of other nodes, passes stop signals on, ends the whole group when one of it dies,
starts it again as often as asked, and says once what went wrong. Workers are forked from a server that has imported torch
once, while this process was still preparing the data.
Source: https://docs.pytorch.org/docs/stable/elastic/agent.html
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import tempfile
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import build
from pretrain.errors import UserError
from pretrain.interrupt import Interrupt
from pretrain.launch.worker import Job, work

if TYPE_CHECKING:
    from pretrain.launch.policy import Policy
    from pretrain.strategy.base import Setting

ANSWER_SECONDS = 3.0


def run_workers(
    resolved: dict[str, Any], overrides: list[str], interrupt: Interrupt, setting: Setting, policy: Policy
) -> int:
    """Prepare the data here, then train in ``setting.workers // setting.nodes`` processes; return the exit code.

    Raises ``UserError`` for a mistake that a worker found, ``WorkersFailed`` when the group failed for good.
    """
    warm_up()
    prepared = build.prepare(resolved, devices=setting.workers * setting.devices_per_worker)
    build.total_steps(resolved, prepared)
    if policy.endpoint is not None:
        check_endpoint(policy.endpoint)
    with tempfile.TemporaryDirectory(prefix="pretrain-") as reports:
        job = Job(resolved, overrides, setting, reports, dict(os.environ), os.getcwd())
        codes = _run_agent(job, interrupt, setting.workers // setting.nodes, policy)
    return next((code for code in codes if code), 0)


def warm_up() -> None:
    """Start the server that workers are forked from: it imports what they need while the data is prepared."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pretrain.launch.preload"])
    multiprocessing.forkserver.ensure_running()


def check_endpoint(endpoint: str) -> None:
    """Raises ``UserError`` when the meeting point is on this machine and something else listens there."""
    host, port = endpoint.rsplit(":", 1)
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"launch.endpoint={endpoint}: no such host: {error}") from None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, int(port)))
        except PermissionError:
            raise UserError(f"launch.endpoint={endpoint}: ports below 1024 need more rights") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # not an address of this machine: another node's
                return
            if not _is_meeting_point(address, int(port)):
                raise UserError(f"launch.endpoint={endpoint}: another program listens there; choose a free port") from None


def _is_meeting_point(address: str, port: int) -> bool:
    """Whether a torch store answers there: the agent of another node, if several share this machine.

    Asked in a thread, for torch waits without end for an answer from what is no store.
    """
    from torch.distributed import DistNetworkError, TCPStore

    found = threading.Event()

    def ask() -> None:
        with suppress(DistNetworkError):
            TCPStore(address, port, is_master=False, wait_for_workers=False)
            found.set()

    threading.Thread(target=ask, daemon=True).start()
    return found.wait(ANSWER_SECONDS)


def _run_agent(job: Job, interrupt: Interrupt, workers: int, policy: Policy) -> list[int]:
    """The workers' exit codes."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # attempts would share a port, and a restart hang
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous import registry as meeting_points

    from pretrain.launch.elastic import Agent

    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn", "torchelastic-events-null"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what happened is said by us, once
    alone = policy.nodes == 1
    meeting = RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0" if alone else str(policy.endpoint),
        run_id=uuid.uuid4().hex if alone else "pretrain",
        min_nodes=policy.nodes,
        max_nodes=policy.nodes,
        local_addr="localhost" if alone else None,
        timeout=policy.timeout,
    )
    spec = WorkerSpec(
        role="pretrain",
        local_world_size=workers,
        entrypoint=work,
        args=(job,),
        rdzv_handler=meeting_points.get_rendezvous_handler(meeting),
        max_restarts=policy.max_restarts,
        monitor_interval=0.05,
    )
    logs = DefaultLogsSpecs(log_dir=f"{job.reports}/elastic")
    agent = Agent(spec, logs_specs=logs, start_method="forkserver", reports=Path(job.reports))
    return agent.outcome(interrupt, Path(job.resolved["output_dir"]))
