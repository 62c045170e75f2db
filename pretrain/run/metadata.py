"""The metadata of a run that is recorded in run.json: model size, device, versions, git commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pretrain.config.schema import RunConfig
    from pretrain.distributed.context import DistributedContext
    from pretrain.strategy.engine import Engine, InferenceEngine

LIBRARIES = ("pretrain", "torch", "transformers", "tokenizers", "datasets", "hydra-core")


def run_facts(
    config: RunConfig, world: DistributedContext, scorer: InferenceEngine, *, restarts: int = 0
) -> dict[str, Any]:
    """Return the metadata, as plain values, for run.json and the ``run_started`` record."""
    import torch

    from pretrain.models.attention import describe

    return {
        "name": config.name,
        "model": config.model_name,
        "parameters": scorer.num_parameters,
        "trained_parameters": scorer.num_trained,
        "strategy": config.strategy.name,
        "precision": scorer.precision.name,
        "attention": describe(scorer.model.hf, scorer.precision.compute_dtype, world.device),
        "world_size": world.size,
        "launch_restarts": restarts,
        "device": device_name(world.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions(),
        "git_commit": git_commit(),
        "host_cores": os.cpu_count(),
    }


def speed_facts(config: RunConfig, engine: Engine, *, devices: int, peak: float | None) -> dict[str, Any]:
    """Return the values from which throughput and MFU are computed.

    ``devices`` counts the devices of all processes. ``peak`` is the peak FLOP/s of one device if the user has given it.
    """
    from pretrain.models.flops import Flops, flops_per_token
    from pretrain.telemetry.peaks import peak_flops

    known = peak_flops(device_name(engine.world.device), engine.precision.products) if peak is None else peak
    shape = {"sequence_length": config.sequence_length, "devices": devices, "peak_flops": known}
    if config.transforms:
        return shape | Flops(unknown="the operations of transformed models are not counted").facts()
    return shape | flops_per_token(engine.model.hf, config.sequence_length).facts()


def mixture_facts(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the first step of each phase of a mixture and the shares of the parts in it; nothing for a single dataset."""
    phases = [
        {"step": phase["first_sample"] // identity["global_batch"], "shares": phase["shares"]}
        for phase in identity.get("mixture", [])
    ]
    return {"mixture": phases} if phases else {}


def device_name(device: torch.device) -> str:
    """Return the kind of device: the GPU's name, or ``cpu``."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries. In a checkout that is not installed, ``pretrain`` has none."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """Return the git commit of the working directory; ``None`` outside a repository or without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
