"""The plan of a run that is starting, made by another process, so that the start does not wait for it.

    python -m pretrain.run.plan_process < question.json > plan.json

The question has the config, the device and the topology; the answer is the plan's record (`pretrain.plan.plan.Plan.record`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pretrain.runtime.console import notice
from pretrain.runtime.python import module_command

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.topology import Topology
    from pretrain.plan.devices import Device


class PlanProcess:
    """A process that plans a run. It needs a core for some seconds, no GPU and no network."""

    def __init__(self, config: RunConfig, device: Device, topology: Topology) -> None:
        question = {"config": config.plain, "device": asdict(device), "topology": asdict(topology)}
        own = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        without = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in without} | own
        self._process: subprocess.Popen[str] = subprocess.Popen(
            module_command("pretrain.run.plan_process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._record: dict[str, Any] | None = None
        with suppress(OSError):  # it has ended already
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(question))
            self._process.stdin.close()
        self._process.stdin = None

    def record(self, *, wait_seconds: float = 0.0) -> dict[str, Any] | None:
        """Return the plan; ``None`` if it is not ready after ``wait_seconds``, or if the run can't be planned."""
        if self._record is None and self._process.returncode is None:
            with suppress(subprocess.TimeoutExpired, ValueError):
                answer, _ = self._process.communicate(timeout=max(wait_seconds, 0.01))
                found = json.loads(answer)
                self._record = found if found.get("peak_bytes") is not None else None
        return self._record

    def close(self) -> None:
        """End the process."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()


def planned_at_start(config: RunConfig, world: DistributedContext, claims: ExitStack) -> PlanProcess | None:
    """Start the plan of a run on its main rank where ``plan.at_start`` says so; elsewhere return ``None``. Its process ends
    when ``claims`` is closed."""
    from pretrain.plan.devices import cpu, device_named

    is_gpu = world.device.type == "cuda"
    if not world.is_main or not (is_gpu if config.plan.at_start == "auto" else config.plan.at_start):
        return None
    device = cpu()
    if is_gpu:
        import torch

        properties = torch.cuda.get_device_properties(world.device)
        device = device_named(properties.name, properties.total_memory)
    return claims.enter_context(closing(PlanProcess(config, device, world.topology)))


def planned_facts(plan: PlanProcess | None, *, wait_seconds: float) -> dict[str, Any]:
    """Return the entries of run.json: the planned peak and the memory of the device in GiB; nothing without a plan."""
    record = plan.record(wait_seconds=wait_seconds) if plan is not None else None
    if record is None:
        if plan is not None and wait_seconds:
            notice("plan.at_start=true: there is no plan of this run; task=plan says why")
        return {}
    room = record["device"]["memory_bytes"] if record["device"]["is_gpu"] else None
    return {"planned_memory_gib": record["peak_bytes"] / 2**30, "device_memory_gib": room and room / 2**30}


def main() -> None:
    """Answer the question on stdin."""
    from pretrain.config.schema import RunConfig
    from pretrain.distributed.topology import Topology
    from pretrain.plan.devices import Device
    from pretrain.run.planning import plan_of

    question = json.load(sys.stdin)
    answer, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    found = plan_of(
        RunConfig.of(question["config"]),
        device=Device(**question["device"]),
        topology=Topology(**question["topology"]),
        compare=False,
    )
    answer.write(json.dumps(found.record()))
    answer.flush()


if __name__ == "__main__":
    main()
