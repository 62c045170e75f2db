"""How many processes a run has and on which devices: from the config and the machine, or from torchrun's environment."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from pretrain.config.check import gpu_visible
from pretrain.distributed.topology import Topology
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.strategy.topology import multi_process_choices, topology_on

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


def started_by_cluster() -> bool:
    """Return whether torchrun or a cluster started this process as one of the run's workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def topology_of(config: RunConfig) -> Topology:
    """Return the topology of the run. Raises ``UserError`` where config, machine and environment do not agree."""
    found = _joined(config) if started_by_cluster() else _planned(config)
    group = config.strategy.model_parallel_size
    if found.world_size % group:
        raise UserError(
            f"strategy={config.strategy.name}: {group} ranks share one replica of the model; {found.world_size} processes "
            f"can't be divided into such groups"
        )
    return replace(found, model_parallel_size=group)


def _planned(config: RunConfig) -> Topology:
    """Return the topology of a run that this process starts."""
    policy = config.launch
    device_type, devices = _devices(config.devices)
    found = topology_on(config, device_type, devices)
    if found.devices < devices * found.nodes:
        notice(
            f"strategy={config.strategy.name} uses 1 of {devices} GPUs; to use all of them: "
            f"strategy={multi_process_choices()}"
        )
    if policy.nodes > 1 and policy.endpoint is None:
        raise UserError(
            f"launch.nodes={policy.nodes}: the nodes need an endpoint: launch.endpoint=<host>:<port> of one of them"
        )
    return found


def _devices(asked: str | int) -> tuple[str, int]:
    """Return the type and the number of devices to use on this machine."""
    if not gpu_visible():
        return "cpu", 1 if asked == "auto" else int(asked)
    found = _gpus()
    if not found:
        return "cpu", 1 if asked == "auto" else int(asked)
    if asked != "auto" and int(asked) > found:
        raise UserError(f"devices={asked}: {found} GPU{'s are' if found > 1 else ' is'} visible; use at most that")
    return "cuda", found if asked == "auto" else int(asked)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _joined(config: RunConfig) -> Topology:
    """Return the topology that torchrun or a cluster has put into the environment."""
    asked, strategy, name = config.devices, config.strategy, config.strategy.name
    size = _number("WORLD_SIZE")
    local = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else size
    rank = _number("RANK")
    if rank >= size or size % local:
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_WORLD_SIZE={local} in the environment do not fit together"
        )
    if asked not in ("auto", local):
        raise UserError(
            f"devices={asked}, but {local} processes were started on this machine (LOCAL_WORLD_SIZE, torchrun's "
            "--nproc_per_node); make them equal, or leave devices=auto"
        )
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and variable not in os.environ:
            raise UserError(f"WORLD_SIZE={size} in the environment without {variable}: torchrun sets all of them")
    if size > 1 and not 0 < _number("MASTER_PORT") < 2**16:
        raise UserError(
            f"MASTER_PORT={os.environ['MASTER_PORT']} in the environment: a port is a number from 1 to 65535"
        )
    if size > 1 and strategy.workers(2) == 1:
        raise UserError(
            f"WORLD_SIZE={size}: strategy={name} is one process; start it without torchrun, or use {multi_process_choices()}"
        )
    gpus = _gpus() if gpu_visible() else 0
    if gpus and local > gpus:
        raise UserError(
            f"LOCAL_WORLD_SIZE={local}: {gpus} GPUs are visible on this machine; start at most as many processes"
        )
    return Topology("cuda" if gpus else "cpu", local, size // local)


def _number(variable: str) -> int:
    value = os.environ[variable]
    if not value.isdigit():
        raise UserError(f"{variable}={value} in the environment: not a number")
    return int(value)
