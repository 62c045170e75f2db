"""One optimizer step on fake tensors, with the real strategy, loss, optimizer and precision, and its memory by kind and phase.

Each phase's peak is linear in the number of sequences of a micro-batch and, for equal layers, in the number of layers. So a
few traces of small models give the peak of a large one; `StepMemory` extrapolates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.data.batch import Batch
from pretrain.models import compilation, loss, packing, recomputed_products
from pretrain.optim.combined import state_tensors
from pretrain.plan.compiled_blocks import fused
from pretrain.plan.cuda_operators import CudaOperators
from pretrain.plan.simulation import SimulatedContext
from pretrain.plan.storages import StorageTracker, Usage
from pretrain.plan.torch_internals import fake_tensors, replaced, resizes_tracked, simulated_group, without_values
from pretrain.plan.traced_model import TracedFactory, has_copied_head, layers_of, traced_spec
from pretrain.strategy.base import StepConfig
from pretrain.strategy.loss_scaler import LossScaler

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.config.schema import RunConfig
    from pretrain.distributed.topology import Topology
    from pretrain.models.language_model import LanguageModel
    from pretrain.strategy.engine import Engine

GPU_UNIT = 512  # bytes: torch's allocator for GPUs rounds every size up to a multiple
PHASES = ("forward", "loss", "backward", "backward of the first layers", "update")


@dataclass(frozen=True)
class Traced:
    """What a step is traced with.

    Attributes:
        config: the config of the run.
        spec: the model.
        optimizer: builds the optimizer of a model.
        topology: all ranks of the run.
        is_gpu: whether the devices are GPUs.
        memory_bytes: the memory of a device, on which the size of the loss's chunks depends; ``None`` if it is unknown.
        fused_loss: whether the loss is computed in chunks.
    """

    config: RunConfig
    spec: Any
    optimizer: Callable[[LanguageModel], Optimizer]
    topology: Topology
    is_gpu: bool
    memory_bytes: int | None = None
    fused_loss: bool = False

    def with_fused_loss(self) -> Traced:
        """Return the same with the right ``fused_loss``, which the operations of a shallow model show."""
        spec = traced_spec(self.spec, checkpointing=False, layers=1 if layers_of(self.spec) else None)
        with fake_tensors(), packing.known(packed=False):
            hf = self._factory(spec).build(torch.device("cpu")).hf
            hf.eval()
            return replace(self, fused_loss=has_copied_head(hf))

    def _factory(self, spec: Any) -> TracedFactory:
        precision, seed = self.config.precision.param_dtype, self.config.seed
        options = {"fused_loss": self.fused_loss, "compiles": bool(self.spec.compile)}
        return TracedFactory(spec, precision, seed, self.config.transforms, **options)

    @contextmanager
    def _loss(self) -> Iterator[None]:
        """Inside this context the loss has chunks as large as on the device, and is compiled if the run's is."""
        share = (self.memory_bytes or 0) // loss.DEVICE_SHARE // 4 if self.is_gpu else 0
        largest = max(loss.CHUNK_LOGITS, share)
        with ExitStack() as stack:
            stack.enter_context(replaced(loss, chunk_logits=lambda device: largest))
            if self.is_gpu:
                stack.enter_context(replaced(loss, block_rows=len))
            if self.spec.compile:
                stack.enter_context(replaced(loss, _eager_chunk=loss._traced_chunk))
                stack.enter_context(replaced(compilation, compiled=fused))
            yield

    def step(self, rows: int, spec: Any) -> Trace:
        """Trace the second step of a run with micro-batches of ``rows`` sequences of the model ``spec``."""
        tracker = StorageTracker(unit=GPU_UNIT if self.is_gpu else 1)
        config, packed = self.config, self.config.dataset.document_mask
        with ExitStack() as stack:
            if config.strategy.needs_group or self.topology.world_size > 1:
                stack.enter_context(simulated_group(0, self.topology.world_size))
            for context in (fake_tensors(), packing.known(packed=packed), resizes_tracked(tracker)):
                stack.enter_context(context)
            stack.enter_context(self._loss())
            stack.enter_context(
                replaced(recomputed_products, equal_bits=lambda one, other: True)
            )  # they have no values
            stack.enter_context(CudaOperators() if self.is_gpu else nullcontext())
            stack.enter_context(tracker)
            world = SimulatedContext(0, self.topology, torch.device("cpu"))
            step = StepConfig.of(config)
            factory = self._factory(spec)
            engine = config.strategy.setup(factory, self.optimizer, step, world)
            engine.model.repeats_products = not (self.is_gpu or self.spec.compile)
            _prepare(engine, tracker)
            tracker.kind = "buffers"  # also the weights of a base model that the objective needs
            reference = partial(config.objective.reference, config.strategy, factory, step, world)
            engine.term = config.objective.term(engine, reference)
            return _traced_step(engine, tracker, rows, config)


@dataclass(frozen=True)
class Trace:
    """One traced step.

    Attributes:
        usage: memory by phase.
        communicated: bytes per micro-batch that rank 0 gathers, and per step that it reduces.
    """

    usage: dict[str, Usage]
    communicated: dict[str, int]


def _prepare(engine: Engine, tracker: StorageTracker) -> None:
    """Tag what the setup has allocated, and replace what reads values."""
    tracker.tag(_states(engine.model), "weights")
    engine.scaler = LossScaler("cpu", enabled=False)

    def update(refused: Tensor) -> None:
        engine.optimizer.step()

    engine.update = update  # type: ignore[method-assign]

    def sent(size: int) -> None:
        tracker.communicated["reduced"] += size

    without_values(engine.step_module, sent)


def _states(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _moments(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from state_tensors(state)


def _traced_step(engine: Engine, tracker: StorageTracker, rows: int, config: RunConfig) -> Trace:
    """Trace a step whose moments exist, and before whose last micro-batch the gradients of the others exist."""
    _give_gradients(engine.model)
    engine.optimizer.step()
    engine.optimizer.zero_grad(set_to_none=True)
    tracker.tag(_moments(engine.optimizer), "moments")
    hooks = config.build_hooks().values()
    for hook in hooks:
        hook.setup(engine)
        tracker.tag((value for value in hook.state_dict().values() if isinstance(value, Tensor)), "hooks")
    batch = _batch(rows, config)
    tracker.restart()
    if config.gradient_accumulation_steps > 1:
        if getattr(config.strategy, "accumulate_unsharded", False):
            with _phases(engine.model, tracker):
                engine.backward(batch, tokens=rows, last=False)
        else:
            _give_gradients(engine.model)
        tracker.tag(_gradients(engine.model), "gradients")
    tracker.phase = "forward"
    tracker.restart()
    with _phases(engine.model, tracker):
        engine.backward(batch, tokens=rows, last=True)
    tracker.tag(_gradients(engine.model), "gradients")
    tracker.phase, tracker.kind = "update", "temporary"
    engine.step(config.grad_clip)
    return Trace(tracker.usage(), dict(tracker.communicated))


def _give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def _batch(rows: int, config: RunConfig) -> Batch:
    ids = torch.zeros(rows, config.sequence_length, dtype=torch.int64)
    positions = torch.zeros_like(ids) if config.dataset.document_mask else None
    return Batch(ids, torch.zeros_like(ids), positions, num_targets=ids.numel())


@contextmanager
def _phases(model: LanguageModel, tracker: StorageTracker) -> Iterator[None]:
    """Inside this context ``tracker`` has the phase of the forward and the backward that run."""

    def phase(name: str, kind: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            tracker.phase, tracker.kind = name, kind

        return hook

    hf, middle = model.hf, _middle_block(model.hf)
    backward_of_the_rest = phase("backward of the first layers", "temporary")

    def at_middle(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(backward_of_the_rest)

    hooks = [model.register_forward_hook(phase("backward", "temporary"))]
    if hf.base_model is hf:
        hooks.append(hf.get_output_embeddings().register_forward_pre_hook(phase("loss", "loss")))
    else:
        hooks.append(hf.base_model.register_forward_hook(phase("loss", "loss")))
    if middle is not None:
        hooks.append(middle.register_forward_hook(at_middle))
    phase("forward", "activations")()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _middle_block(hf: nn.Module) -> nn.Module | None:
    """Return the block in the middle of the longest list of modules."""
    lists = [m for m in hf.modules() if isinstance(m, nn.ModuleList)]
    blocks = max(lists, key=len, default=None)
    return blocks[(len(blocks) - 1) // 2] if blocks is not None and len(blocks) > 1 else None
