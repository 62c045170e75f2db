"""How a strategy divides the devices of a run among processes, on any kind of device. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from pretrain.config.choices import choices
from pretrain.config.defaults import conf_dir
from pretrain.config.schema import build_part
from pretrain.distributed.topology import Topology
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


def topology_on(config: RunConfig, device_type: str, devices: int) -> Topology:
    """Return the topology of a run on machines with ``devices`` devices of ``device_type`` each.

    Raises ``UserError`` for a strategy that can't use as many devices or machines.
    """
    strategy, nodes, name = config.strategy, config.launch.nodes, config.strategy.name
    workers, each = strategy.workers(devices), strategy.devices_per_worker(devices)
    if config.devices not in ("auto", workers * each):
        raise UserError(
            f"devices={devices}: strategy={name} is one process on one device; allowed: auto, 1; for several: "
            f"strategy={multi_process_choices()}"
        )
    if nodes > 1 and strategy.workers(2) == 1:
        raise UserError(f"launch.nodes={nodes}: strategy={name} is one process; use {multi_process_choices()}")
    return Topology(device_type, workers, nodes, each)


def multi_process_choices() -> str:
    """Return the choices of the strategy group that use several processes, as "a, b or c"."""
    found = []
    for name in choices("strategy"):
        options = OmegaConf.load(conf_dir() / f"strategy/{name}.yaml")
        if build_part({str(key): value for key, value in options.items()}).workers(2) > 1:
            found.append(name)
    return " or ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))
