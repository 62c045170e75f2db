"""Run a task in this process, in workers that this process starts and supervises, or as a worker of torchrun or a cluster.

Data is prepared before a process group exists, so that no rank waits in a collective while another one tokenizes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from pretrain.distributed.rank_info import RankInfo
from pretrain.distributed.sockets import address_towards, is_loopback
from pretrain.distributed.topology import Topology
from pretrain.launch.config import LaunchConfig
from pretrain.launch.network import check_interfaces, check_master
from pretrain.launch.topology import started_by_cluster, topology_of
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.signals import Interrupt
from pretrain.strategy.base import StepConfig

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


def launch(config: RunConfig, overrides: list[str], interrupt: Interrupt, *, config_dir: str | None = None) -> int:
    """Run ``config.task`` and return the exit code. ``config_dir`` is the value of ``--config-dir``.

    Raises ``UserError`` for a mistake, in this process or in a worker, and ``WorkersFailed`` for a bug in a worker.
    """
    if config.task != "pretraining":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"task={config.task} is one process; start it without torchrun")
        from pretrain.run import tasks

        if config.task == "advise":
            topology = topology_of(config)
            return tasks.advise(
                config, overrides, interrupt, devices=topology.data_parallel_devices, config_dir=config_dir
            )
        if config.devices not in ("auto", 1) and config.task != "plan":
            notice(f"task={config.task} is one process: strategy and devices have no effect")
        return tasks.TASKS[config.task](config, overrides, interrupt)
    policy, joined = config.launch, started_by_cluster()
    topology = topology_of(config)
    check_auto(config)
    config.strategy.check(StepConfig.of(config), topology)
    place = rank_info(topology) if joined else RankInfo(topology=topology)
    if joined:
        check_joined(place, policy)
    elif policy.max_restarts and topology.world_size == 1:
        notice("launch.max_restarts has no effect on one process: no parent process would be left to restart it")
    if joined or topology.world_size == 1:
        from pretrain.run import tasks

        return tasks.pretraining(config, overrides, interrupt, place)
    from pretrain.launch.agent import run_workers

    return run_workers(config.plain, overrides, topology, policy)


def check_joined(place: RankInfo, policy: LaunchConfig) -> None:
    """Check a run whose processes torchrun or a cluster has started, and report the settings that have no effect there.

    Where the attempts of a run share torchrun's store, a restarted attempt may find the addresses of the one that died; a
    notice says how to avoid that.

    Raises ``UserError`` when another program uses the port, or when this process would listen on an interface that the
    other processes can't reach.
    """
    keys = [k for k in ("max_restarts", "nodes", "endpoint") if getattr(policy, k) != getattr(LaunchConfig, k)]
    if keys and place.rank == 0:
        given = ", ".join(f"launch.{key}" for key in keys)
        notice(f"{given}: no effect under RANK and WORLD_SIZE; the program that started the processes decides them")
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if place.rank == 0 and shares_store and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        notice(
            "torchrun --max-restarts works reliably with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment only"
        )
    if not place.one_machine:
        check_interfaces(os.environ["MASTER_ADDR"], place.topology.device_type)
    if place.topology.world_size > 1 and not place.run_id:  # with a run id, torchrun has chosen the port
        check_master(place.rank)


def check_auto(config: RunConfig) -> None:
    """Raise ``UserError`` where ``batch_size=auto`` can't be determined with the strategy."""
    strategy = config.strategy
    if config.batch_size == "auto" and not strategy.independent_forward:
        raise UserError(
            f"batch_size=auto with strategy={strategy.name}: its ranks need each other in every forward, so one that runs "
            "out of memory would leave the others waiting; give batch_size a number; single, dp and ddp can find it"
        )


def rank_info(topology: Topology) -> RankInfo:
    """Return this process's rank in a run that torchrun or a cluster started, from the environment."""
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank % topology.workers_per_node))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return RankInfo(rank, local_rank, topology, restarts, run_id, one_machine=_on_one_machine(topology))


def _on_one_machine(topology: Topology) -> bool:
    """Return whether all processes run on this machine. Without LOCAL_WORLD_SIZE, MASTER_ADDR decides."""
    if topology.nodes > 1 or topology.world_size == 1 or "LOCAL_WORLD_SIZE" in os.environ:
        return topology.nodes == 1
    with suppress(OSError):
        return is_loopback(address_towards(os.environ["MASTER_ADDR"]))
    return False
