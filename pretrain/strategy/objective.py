"""What a run minimises: the cross entropy of the next token, alone or with a term that keeps the model close to the base model.

The base model is the model before this run. A term changes gradients only: losses in records stay the
cross entropy, and the term's value is a number of its own in the train records.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.data.batch import Batch
    from pretrain.strategy.engine import Engine, InferenceEngine

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Objective:
    """The mean cross entropy of the next token."""

    def term(self, engine: Engine, reference: Callable[[], InferenceEngine]) -> Term | None:
        """Return the term that is added for ``engine``, which has the weights of the base model; ``None`` for no term.
        ``reference`` builds a second, frozen model with these weights. All ranks must call this."""
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
    """

    weight: Positive = 0.1
    temperature: Positive = 1.0

    def term(self, engine: Engine, reference: Callable[[], InferenceEngine]) -> Term | None:
        if not engine.model.fused_loss:
            raise UserError(
                f"objective=kl_to_base: {type(engine.model.hf).__name__} caps or scales its logits; use objective=l2_to_base, "
                "or replay.share"
            )
        if engine.model.balancing:
            raise UserError(
                "objective=kl_to_base: this mixture of experts trains a load balancing loss (output_router_logits: true in its "
                "config.json), which is not computed beside the divergence; use objective=l2_to_base, or set it to false"
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
        if not engine.has_gradients:
            raise UserError(
                "objective=l2_to_base with strategy=deepspeed at stages 1 to 3: their gradients are inside DeepSpeed; use "
                "strategy.zero_stage=0, strategy=fsdp, or objective=kl_to_base"
            )
        return _L2Term(self, engine)


class _L2Term(Term):
    name = "l2_to_base"

    def __init__(self, settings: L2ToBase, engine: Engine) -> None:
        import torch

        self._weight = settings.weight
        trained = [p for p in engine.model.parameters() if p.requires_grad]
        self._pairs = [(p, p.detach().clone()) for p in trained]
        self._distance = torch.zeros((), device=engine.world.device)

    def add_gradients(self, engine: Engine) -> None:
        import torch

        from pretrain.strategy.gradient_norm import norm_of_rows

        rows = []
        with torch.no_grad():
            for parameter, base in self._pairs:  # one difference at a time: together they are as large as the model
                difference = parameter.detach() - base
                rows.append(norm_of_rows(difference))
                if parameter.grad is not None:
                    parameter.grad.add_(difference.to(parameter.grad.dtype), alpha=self._weight)
        self._distance = _norm(rows).to(engine.world.device, non_blocking=True)

    def take(self, engine: Engine, divisor: float) -> Tensor:
        return self._distance.float()


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm over all tensors, sharded and full ones. This is a collective if there are shards."""
    import torch
    from torch.distributed.tensor import DTensor

    from pretrain.strategy.gradient_norm import total_norm

    sharded: list[Tensor] = [t for t in tensors if isinstance(t, DTensor)]
    full = [t for t in tensors if not isinstance(t, DTensor)]
    return torch.linalg.vector_norm(torch.stack([total_norm(kind) for kind in (sharded, full) if kind]))
