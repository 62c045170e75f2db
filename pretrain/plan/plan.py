"""The plan of a run: its memory by kind, the micro-batches that fit, its time and its files, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pretrain.distributed.sharding import SHARE_BYTES
from pretrain.plan.advice import other_settings
from pretrain.plan.devices import Device
from pretrain.plan.memory import Kinds, StepMemory, step_memory
from pretrain.plan.speed import Speed
from pretrain.plan.trace import Traced
from pretrain.plan.zero import is_estimated, saved_by_zero
from pretrain.runtime.errors import UserError, one_line
from pretrain.strategy.base import StepConfig
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.config.schema import RunConfig
    from pretrain.distributed.topology import Topology
    from pretrain.models.language_model import LanguageModel

MOST_ROWS = 4096  # sequences of a micro-batch, to which the search for the largest one is limited
KINDS = {  # kind → what it is, in the order of the table
    "weights": "weights and buffers of the model",
    "casts": "weights in the matmul dtype",
    "gradients": "gradients",
    "moments": "optimizer state",
    "hooks": "state of hooks",
    "buffers": "buffers of the strategy",
    "activations": "activations of a micro-batch",
    "loss": "loss (logits, gradient of the head)",
    "temporary": "temporary tensors",
    "workspace": "workspaces of cuBLAS",
    "other": "other",
}
ON_HOST = ("weights", "gradients", "moments", "hooks")  # with an offload to the host


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch that fits on one kind of device, without and with activation checkpointing; 0: none does."""

    device: str
    memory_bytes: int | None
    plain: int | None
    checkpointed: int | None


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts. Sizes are in bytes, for one device or process unless stated otherwise.

    Attributes:
        model: name, ``parameters`` and ``trained`` ones.
        setup: the settings that the plan is for.
        device: the device.
        peak: bytes by kind at the peak of a step; empty if the step can't be traced.
        peak_phase: the phase of the step in which the peak occurs.
        between_steps: bytes by kind before and after a step.
        host_bytes: host memory of one process for the copy of a checkpoint, and for what is offloaded.
        fits: the largest micro-batches by device.
        communicated: bytes that one process gathers and reduces for each step.
        checkpoint: ``bytes``, ``files`` and ``bytes_per_process`` of a checkpoint.
        data: ``tokens`` of the training documents and ``bytes`` of the token cache; ``None`` where they are not cached.
        speed: operations, steps, tokens/s and hours.
        changes: overrides with which less memory is needed, the most effective first.
        notes: what the plan does not contain.
    """

    model: dict[str, Any]
    setup: dict[str, Any]
    device: Device
    peak: Kinds
    peak_phase: str
    between_steps: Kinds
    host_bytes: dict[str, float]
    fits: tuple[Fit, ...]
    communicated: Kinds
    checkpoint: dict[str, float]
    data: dict[str, Any]
    speed: Speed
    changes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> float | None:
        """The peak of a step; ``None`` if it can't be traced."""
        return sum(self.peak.values()) if self.peak else None

    @property
    def fits_device(self) -> bool | None:
        """Whether the peak fits on the device; ``None`` if one of the two is unknown."""
        if self.peak_bytes is None or self.device.usable_bytes is None:
            return None
        return self.peak_bytes <= self.device.usable_bytes

    def record(self) -> dict[str, Any]:
        """Return the plan as plain values, as plan.json has it."""
        plain = asdict(self)
        plain["device"] |= {"usable_bytes": self.device.usable_bytes}
        return plain | {"peak_bytes": self.peak_bytes, "fits_device": self.fits_device}


@dataclass(frozen=True)
class Question:
    """What is planned.

    Attributes:
        config: the config of the run.
        spec: its model.
        topology: its processes.
        device: the device of each process.
        optimizer: builds the optimizer of a model.
        data: see `Plan`.
        speed: builds the speed from the model on the meta device.
        compare: other devices; ``None``: no largest micro-batches, which takes half of the time.
    """

    config: RunConfig
    spec: Any
    topology: Topology
    device: Device
    optimizer: Callable[[LanguageModel], Optimizer]
    data: dict[str, Any] = field(default_factory=dict)
    speed: Callable[[Any], Speed] = lambda hf: Speed()
    compare: Sequence[Device] | None = None

    def answer(self) -> Plan:
        """Return the plan. Raises ``UserError`` for a model that can't be built from its config."""
        from pretrain.plan.zero import estimated
        from pretrain.strategy.engine import count_parameters

        config, notes = self.config, []
        meta = self._on_meta()
        parameters, trained = count_parameters(meta)
        memory: dict[bool, StepMemory] = {}
        traced = self._traced()
        checkpoints = bool(self.spec.gradient_checkpointing)
        given = MicroBatching.from_config(config)
        try:
            traced = traced.with_fused_loss()
            memory[checkpoints] = step_memory(traced, rows=given.batch_size)
            if self.compare is not None:
                memory[not checkpoints] = step_memory(traced, rows=given.batch_size, checkpointing=not checkpoints)
        except Exception as error:  # of any type, from any operation of the model
            notes.append(
                f"activations: the step can't be traced without values ({type(error).__name__}: {one_line(error)})"
            )
            memory = {}
        if is_estimated(config):
            memory = {key: estimated(config, found, trained, self.topology) for key, found in memory.items()}
            notes.append(
                "strategy=deepspeed: activations are traced, ZeRO's shards and buffers estimated from its settings"
            )
        fixed: Kinds = {"workspace": self.device.workspace_bytes} if self.device.workspace_bytes else {}
        memory = {key: replace(found, fixed=found.fixed | fixed) for key, found in memory.items()}
        notes += self._notes()
        chosen = memory.get(checkpoints)
        split = self._split(chosen, given)
        return self._plan(meta, chosen, memory, split, parameters, trained, notes)

    def _on_meta(self) -> LanguageModel:
        from pretrain.models.model_factory import ModelFactory
        from pretrain.plan.traced_model import traced_spec

        config = self.config
        spec = traced_spec(self.spec)
        return ModelFactory(spec, config.precision.param_dtype, config.seed, config.transforms).build_on_meta()

    def _traced(self) -> Traced:
        from pretrain.plan.zero import as_traced

        config, topology = as_traced(self.config, self.topology)
        return Traced(config, self.spec, self.optimizer, topology, self.device.is_gpu, self.device.memory_bytes)

    def _notes(self) -> list[str]:
        """Return what the plan leaves out with these settings."""
        notes = []
        if self.spec.compile:
            notes.append("model.compile: each block is traced as torch partitions and fuses it; nothing is compiled")
        if self.spec.attention not in ("sdpa", "eager", "auto"):
            notes.append(
                f"model.attention={self.spec.attention}: traced as sdpa, which saves tensors of the same sizes"
            )
        if getattr(self.spec, "activation_offload", False):
            notes.append("model.activation_offload: the activations are counted on the device, where few of them stay")
        if self.topology.devices_per_worker > 1:
            notes.append("strategy=dp: the first device also holds the gradients that the others send to it")
        if not self.device.is_gpu:
            notes.append(
                "on a CPU these are the tensors; the process also holds libraries and memory that it keeps after use"
            )
        return notes

    def _split(self, memory: StepMemory | None, given: MicroBatching) -> MicroBatching:
        """Return the micro-batches of the run; with ``batch_size=auto`` the largest that fit."""
        if self.config.batch_size != "auto" or memory is None or self.device.usable_bytes is None:
            return given
        rows = memory.largest(self.device.usable_bytes, most=given.total)
        return given.of(max((size for size in given.sizes() if size <= rows), default=1))

    def _plan(
        self,
        meta: LanguageModel,
        chosen: StepMemory | None,
        memory: dict[bool, StepMemory],
        split: MicroBatching,
        parameters: int,
        trained: int,
        notes: list[str],
    ) -> Plan:
        config = self.config
        peak = chosen.peak(split.batch_size) if chosen else None
        between = {kind: size for kind, size in (chosen.between_steps() if chosen else {}).items() if size}
        saved = {kind: between.get(kind, 0.0) for kind in ("weights", "moments", "hooks")}
        saved = saved_by_zero(config, trained, self.topology) or saved
        largest = max(p.numel() * p.element_size() for p in meta.parameters())
        files = _checkpoint(saved, self.topology, sharded=not config.strategy.independent_forward, largest=largest)
        kinds = dict(peak.kinds) if peak else {}
        host = {"checkpoint copy": files["bytes_per_process"]} if config.checkpoint.async_ else {}
        if _offloads(config.strategy) and self.device.is_gpu:
            host["offloaded"] = sum(kinds.pop(kind, 0.0) for kind in ON_HOST)
        plan = Plan(
            model={"name": config.model_name, "parameters": parameters, "trained": trained},
            setup=_setup(config, self.topology, split, self.spec),
            device=self.device,
            peak={kind: kinds[kind] for kind in KINDS if kinds.get(kind, 0.0) >= 1},
            peak_phase=peak.phase if peak else "",
            between_steps=between,
            host_bytes=host,
            fits=tuple(self._fit(device, memory) for device in self._compared()),
            communicated=_per_step(chosen.communicated(), config) if chosen else {},
            checkpoint=files,
            data=self.data,
            speed=self.speed(meta.hf),
            notes=tuple(notes),
        )
        return replace(plan, changes=tuple(self._changes(plan, memory, split)))

    def _compared(self) -> list[Device]:
        """Return the devices whose largest micro-batch is listed: the planned one first; only that for a CPU."""
        if self.compare is None:
            return []
        return list(dict.fromkeys((self.device, *(self.compare if self.device.is_gpu else ()))))

    def _fit(self, device: Device, memory: dict[bool, StepMemory]) -> Fit:
        offloaded = _offloads(self.config.strategy) and self.device.is_gpu

        def rows(found: StepMemory | None) -> int | None:
            if found is None or device.usable_bytes is None:
                return None
            on_host = sum(found.between_steps().get(kind, 0.0) for kind in ON_HOST) if offloaded else 0.0
            return found.largest(device.usable_bytes + on_host, most=MOST_ROWS)

        return Fit(device.name, device.memory_bytes, rows(memory.get(False)), rows(memory.get(True)))

    def _changes(self, plan: Plan, memory: dict[bool, StepMemory], split: MicroBatching) -> list[str]:
        """Return what to change if the plan does not fit."""
        if plan.fits_device is not False:
            return []
        changes, usable, checkpoints = [], self.device.usable_bytes or 0, bool(self.spec.gradient_checkpointing)
        for key, words in ((checkpoints, ""), (True, " model.gradient_checkpointing=true")):
            found = memory.get(key)
            rows = found.largest(usable, most=split.total) if found else 0
            sizes = [size for size in split.sizes() if size <= rows]
            if sizes and not (key and not words and checkpoints != key):
                fitting = split.of(sizes[-1])
                changes.append(
                    f"batch_size={fitting.batch_size} gradient_accumulation_steps={fitting.accumulation}{words}"
                )
        changes = list(dict.fromkeys(changes))
        changes += other_settings(self.config, is_gpu=self.device.is_gpu, checkpointing=not changes)
        return changes + self.config.strategy.memory_saving_overrides(StepConfig.of(self.config), self.topology)


def check_fits(plan: Plan) -> None:
    """Raise ``UserError`` for a plan that does not fit on its device, or of which that is unknown."""
    from pretrain.runtime.memory import gib

    if plan.fits_device:
        return
    if plan.fits_device is None:
        raise UserError(f"plan.require=true: whether it fits on {plan.device.name} is unknown: {'; '.join(plan.notes)}")
    assert plan.peak_bytes is not None
    assert plan.device.usable_bytes is not None
    ways = f"; what needs less: {' · '.join(plan.changes)}" if plan.changes else ""
    raise UserError(
        f"plan.require=true: a step needs {gib(plan.peak_bytes)}, {plan.device.name} has room for "
        f"{gib(plan.device.usable_bytes)}{ways}"
    )


def _per_step(sent: Kinds, config: RunConfig) -> Kinds:
    """Return the bytes that are sent in a step, from those of its last micro-batch; ZeRO's are those of the step."""
    if is_estimated(config):
        return {name: size for name, size in sent.items() if size}
    steps = config.gradient_accumulation_steps
    reduces_each = config.strategy.name == "fsdp" and not getattr(config.strategy, "accumulate_unsharded", False)
    found = {
        "gathered": sent.get("gathered", 0.0) * steps,
        "reduced": sent.get("reduced", 0.0) * (steps if reduces_each else 1),
    }
    return {name: size for name, size in found.items() if size}


def _offloads(strategy: Any) -> bool:
    return bool(getattr(strategy, "cpu_offload", False) or getattr(strategy, "offload_optimizer", False))


def _setup(config: RunConfig, topology: Topology, split: MicroBatching, spec: Any) -> dict[str, Any]:
    return {
        "strategy": config.strategy.name,
        "precision": config.precision.name,
        "processes": topology.world_size,
        "devices": topology.devices,
        "sequence_length": config.sequence_length,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "compile": spec.compile,
    } | split.facts()


def _checkpoint(saved: Kinds, topology: Topology, *, sharded: bool, largest: float) -> dict[str, float]:
    """Return size and number of the tensor files of a checkpoint, and the bytes of the process that writes most. A strategy that
    shards writes two files per process; others share what all processes hold (`pretrain.distributed.sharding.writers`), whose
    ``largest`` tensor one of them writes."""
    own, ranks = sum(saved.values()), topology.world_size
    if sharded:
        return {"bytes": own * ranks, "files": 2.0 * ranks, "bytes_per_process": own}
    writers = {kind: max(1, min(ranks, int(size // SHARE_BYTES))) for kind, size in saved.items()}
    most = sum(max(size / writers[kind], min(size, largest)) for kind, size in saved.items())
    return {"bytes": own, "files": float(writers["weights"] + writers["moments"]), "bytes_per_process": most}
