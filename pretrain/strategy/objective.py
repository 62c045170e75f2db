"""What a run minimises: the cross entropy of the next token, alone or with a term that keeps the model close to the base model.

The base model is the model before this run. A term changes gradients only: losses in records stay the
cross entropy, and the term's value is a number of its own in the train records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.data.batch import Batch
    from pretrain.distributed.context import DistributedContext
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.base import StepConfig, Strategy
    from pretrain.strategy.engine import Engine, InferenceEngine

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Objective:
    """The mean cross entropy of the next token."""

    def reference(
        self, strategy: Strategy, factory: ModelFactory, step: StepConfig, world: DistributedContext
    ) -> InferenceEngine:
        """Return a second model with the weights of the base model, for forwards alone. All ranks must call this."""
        return strategy.reference(factory, step, world)

    def term(self, engine: Engine, reference: Callable[[], InferenceEngine]) -> Term | None:
        """Return the term that is added for ``engine``, which has the weights of the base model; ``None`` for no term.
        ``reference`` calls `reference`. All ranks must call this."""
        return None


class Term(ABC):
    """A term of the objective that is added to the cross entropy, and its value in a step."""

    name: str

    def losses(self, engine: Engine, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a micro-batch with the term, whose gradient is taken, and the cross entropy alone,
        detached."""
        loss = engine.cross_entropy(batch)
        return loss, loss.detach()

    def add_gradients(self, engine: Engine) -> None:
        """Add the gradient of a term that does not depend on the data, after the last backward of a step."""
        return

    def restart(self) -> None:
        """Forget the micro-batches of this step, such as those that were tried before the first one."""
        return

    @abstractmethod
    def take(self, engine: Engine, divisor: float) -> Tensor:
        """Return the value of the term in the step, an fp32 scalar on the device, equal on all ranks, and start the next step.
        The loss was divided by ``divisor``."""


@dataclass(frozen=True)
class KlToBase(Objective):
    """Cross entropy + ``weight`` × ``temperature``² × KL(base ‖ model) of the softened next-token distributions (Hinton et al.,
    arXiv:1503.02531), on all training text: the new one and, with replay, the old.

    It needs a forward of the frozen base model for every micro-batch, and its weights: under fsdp sharded like the model's,
    elsewhere a full copy on every rank.

    Attributes:
        weight: Factor of the divergence; nats of divergence count as this many nats of loss.
        temperature: Temperature of both distributions.
        base_dtype: Dtype of the base model's weights: bfloat16 · null (that of the run's weights).
        base_offload: true: keep the shards of the base model on the host; strategy=fsdp.
    """

    weight: Positive = 0.1
    temperature: Positive = 1.0
    base_dtype: Literal["bfloat16"] | None = None
    base_offload: bool = False

    def reference(
        self, strategy: Strategy, factory: ModelFactory, step: StepConfig, world: DistributedContext
    ) -> InferenceEngine:
        if self.base_dtype is not None:
            compute = "bfloat16" if step.precision.compute == "float32" else step.precision.compute
            step = replace(step, precision=replace(step.precision, weights=self.base_dtype, compute=compute))
            factory = replace(factory, param_dtype=step.precision.param_dtype)
        return strategy.reference(factory, step, world, **({"offload": True} if self.base_offload else {}))

    def term(self, engine: Engine, reference: Callable[[], InferenceEngine]) -> Term | None:
        if engine.model.logits_map is None:
            raise UserError(
                f"objective=kl_to_base: the head of {type(engine.model.hf).__name__} is not a matrix alone, as with "
                "transform.lora.targets or another transform that wraps it; use objective=l2_to_base, or replay.share"
            )
        if engine.model.is_one_graph:
            raise UserError(
                "objective=kl_to_base with model.compile=graph: the divergence is not in the graph; use blocks"
            )
        return _KlTerm(self, engine, reference())


class _KlTerm(Term):
    name = "kl_to_base"

    def __init__(self, settings: KlToBase, engine: Engine, reference: InferenceEngine) -> None:
        import torch

        self._reference = reference
        self._factor = settings.weight * settings.temperature**2
        self._temperature = settings.temperature
        self._summed = torch.zeros((), device=engine.world.device)
        reference.model.requires_grad_(False).eval()

    def losses(self, engine: Engine, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = self._reference.hidden_states(batch)
        if engine.model.base_head is None or engine.model.base_head.weight.device != hidden.device:
            base_head = self._reference.model.base_head
            assert base_head is not None  # copied by the forward above
            engine.model.base_head = base_head.to(hidden.device)
        loss, kl = engine.cross_entropy_and_kl(batch, hidden, self._temperature)
        self._summed += kl.detach()
        return loss + self._factor * kl, loss.detach()

    def take(self, engine: Engine, divisor: float) -> Tensor:
        value = engine.world.data_all_reduce_sum(self._summed.clone()) / divisor
        self.restart()
        return value

    def restart(self) -> None:
        self._summed.zero_()


@dataclass(frozen=True)
class L2ToBase(Objective):
    """Cross entropy + ``weight`` / 2 × the squared distance of the trained weights to those of the base model (L2-SP, Li et al.,
    arXiv:1802.01483).

    It needs a copy of the trained weights, sharded like them, and no second forward.

    Attributes:
        weight: Factor of half the squared distance.
    """

    weight: Positive = 0.01

    def term(self, engine: Engine, reference: Callable[[], InferenceEngine]) -> Term | None:
        return _L2Term(self, engine)


class _L2Term(Term):
    name = "l2_to_base"

    def __init__(self, settings: L2ToBase, engine: Engine) -> None:
        import torch

        self._weight = settings.weight
        self._base = {name: part.clone() for name, part in engine.weights.trained().items()}
        self._distance = torch.zeros((), device=engine.world.device)

    def add_gradients(self, engine: Engine) -> None:
        import torch

        weights = engine.weights.trained()
        gradients = engine.weights.gradients()
        weight = self._weight * engine.weights.gradient_scale

        def differences() -> Iterator[Tensor]:  # one at a time: together they are as large as the model
            for name, base in self._base.items():
                difference = weights[name] - base
                gradient = gradients[name]
                if gradient is not None:
                    gradient.add_(difference.to(gradient.dtype), alpha=weight)
                    engine.weights.gradient_changed(name, gradient)
                yield difference

        with torch.no_grad():
            self._distance = engine.weights.distance(differences()).to(engine.world.device, non_blocking=True)

    def take(self, engine: Engine, divisor: float) -> Tensor:
        return self._distance.float()
