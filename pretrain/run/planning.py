"""The plan of a run from its config alone: no GPU, no weights and no text are needed (`pretrain.plan`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pretrain.runtime.errors import UserError
from pretrain.strategy.base import StepConfig
from pretrain.strategy.topology import topology_on
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.distributed.topology import Topology
    from pretrain.plan.devices import Device
    from pretrain.plan.plan import Plan


def plan_of(
    config: RunConfig, *, device: Device | None = None, topology: Topology | None = None, compare: bool = True
) -> Plan:
    """Return the plan of a run.

    Args:
        config: The config of the run; ``config.plan`` names the device.
        device: The device instead of that.
        topology: The processes of the run; by default ``config.devices`` on each machine.
        compare: Also find the largest micro-batches of other devices, and of the other setting of checkpointing.

    Raises:
        UserError: An unknown device, a strategy or a precision that can't work on it, or a model that can't be built.
    """
    from pretrain.plan.devices import device_of, this_device
    from pretrain.plan.plan import Question
    from pretrain.plan.speed import planned_speed
    from pretrain.run.build import optimizer_builder

    given = config.plan
    others = [device_of(name, key="plan.devices") for name in given.devices] if compare else None
    device = device or (this_device() if given.device is None else device_of(given.device))
    kind = "cuda" if device.is_gpu else "cpu"
    topology = topology or topology_on(config, kind, 1 if config.devices == "auto" else config.devices)
    config.precision.check(kind)
    config.strategy.check(StepConfig.of(config), topology)
    spec = unweighted_spec(config)
    global_batch = MicroBatching.from_config(config).total * topology.data_parallel_devices
    data = cached_data(config, spec)

    def speed(hf: Any) -> Any:
        steps = planned_steps(config, data, global_batch)
        return planned_speed(
            config, hf, device=device, devices=topology.devices, steps=steps, global_batch=global_batch
        )

    config = config.with_lr(1.0)
    return Question(config, spec, topology, device, optimizer_builder(config), data, speed, others).answer()


def unweighted_spec(config: RunConfig) -> Any:
    """Return the model that the config names, checked as far as its config.json allows. Its weights need not be there.

    Raises ``UserError`` for a model without a config, and for a sequence that is longer than its positions.
    """
    from pretrain.checkpoint.weights import weights_folder
    from pretrain.models.hub import files
    from pretrain.models.hub.config_files import check_sizes

    spec = config.model
    name = weights_folder(spec.name_or_path, key="model_name", transforms=config.transforms_identity)
    folder = files.model_folder(name, revision=spec.revision, code=spec.trust_remote_code, weights=False)
    spec = replace(spec, name_or_path=str(folder))
    check_sizes(spec.config(), config.model_name)
    files.check_positions(spec.hf_config().to_dict(), config.sequence_length, config.model_name)
    return spec


def cached_data(config: RunConfig, spec: Any) -> dict[str, Any]:
    """Return ``tokens`` and ``bytes`` of the training documents in the token cache; ``None`` where they are not all there."""
    from pretrain.data.tokenization.tokenize import cached_size
    from pretrain.models.tokenizer import boundaries
    from pretrain.run.prepare_data import domain_boundaries

    unknown = {"tokens": None, "bytes": None}
    tokens = size = 0
    try:
        tokenizer = spec.tokenizer(None)
        run_boundaries = boundaries(tokenizer, bos=config.dataset.bos, separator=config.dataset.separator)
        content = tokenizer.backend_tokenizer.to_str()
        for source in config.dataset.sources().values():
            own = domain_boundaries(source, tokenizer, run_boundaries)
            found = cached_size(source, tokenizer_json=content, eot=own.separator, bos=own.bos)
            if found is None:
                return unknown
            tokens += int(found[0] * (1 - source.held_out))
            size += found[1]
    except UserError:  # there is no tokenizer yet, or the dataset has mistakes that do not matter here
        return unknown
    return {"tokens": tokens, "bytes": size}


def planned_steps(config: RunConfig, data: dict[str, Any], global_batch: int) -> tuple[int | None, str | None]:
    """Return the optimizer steps of the run, and where their number is from."""
    if config.max_steps is not None:
        return config.max_steps, "max_steps"
    if data["tokens"] is None or len(config.dataset.sources()) > 1:
        return None, None
    steps = int(data["tokens"] * config.number_epochs / (global_batch * config.sequence_length))
    return max(1, steps), "from number_epochs and the text in the token cache"
