"""Engines: the model and the optimizer under one strategy. `Engine.train_step` makes an optimizer step.

The loss is summed and divided by the *global* number of target tokens, or by the sum of their weights. Therefore gradient
accumulation, packing and the number of ranks change nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.data.batch import Batch
from pretrain.distributed import sharding as tensors
from pretrain.models.attention import Shape, prefer_fast_kernels
from pretrain.models.token_losses import Scores
from pretrain.optim.combined import combined
from pretrain.optim.limits import check_usable
from pretrain.optim.schedule import with_multiplier
from pretrain.runtime.signals import signals_blocked
from pretrain.strategy.engine_state import EngineState
from pretrain.strategy.gradient_norm import norm_of
from pretrain.strategy.optimizer_state import OptimizerState
from pretrain.strategy.replaced import EngineWeights
from pretrain.telemetry.step_timer import StepTimer

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext
    from pretrain.models.language_model import LanguageModel
    from pretrain.strategy.objective import Term
    from pretrain.strategy.precision import Precision


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The numbers of one optimizer step.

    Attributes:
        loss: mean loss of the global batch (nats per target token), a 0-d tensor on the device; with loss weights the weighted
            mean.
        grad_norm: norm of the gradient before clipping, a 0-d tensor on the device.
        tokens: target tokens of the global batch.
        terms: value of the term that the objective adds to the loss, by its name, as a 0-d tensor on the device.
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: int
    terms: dict[str, Tensor] = field(default_factory=dict)


def never(norm: Tensor) -> Tensor:
    """Return False: no update is rejected."""
    return torch.zeros_like(norm, dtype=torch.bool)


def count_parameters(model: LanguageModel) -> tuple[int, int]:
    """Return the number of parameters of ``model`` and of those that are trained; a tied weight counts once."""
    sizes = [(p.numel(), p.requires_grad) for _, p in model.hf_named_parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


class InferenceEngine:
    """A model that can be evaluated. `task=evaluation` needs nothing else.

    Attributes:
        model: the model.
        precision: dtypes of weights and computation.
        world: the ranks and their collectives.
        num_parameters: number of parameters of the full model.
        num_trained: number of those that are trained.
        weights: the weights as tensors that can be averaged, compared and replaced.
        alive: called after every forward without a backward: a heartbeat for the watchdog.
        interrupted: whether a stop signal has arrived; a collective, which a long measurement calls between its forwards.
    """

    def __init__(self, model: LanguageModel, *, precision: Precision, world: DistributedContext) -> None:
        self.model = model
        self.precision = precision
        self.world = world
        self.alive: Callable[[], None] = lambda: None
        self.interrupted: Callable[[], bool] = lambda: False
        self.weights = EngineWeights(self)
        self.num_parameters, self.num_trained = count_parameters(model)
        if model.picks_kernels and world.device.type == "cuda":
            prefer_fast_kernels(Shape.of(model.hf, precision.compute_dtype), world.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of every forward."""
        return self.precision.autocast(self.world.device.type)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Return the summed loss of a batch (nats, fp32, on the device). The model must be in eval mode."""
        return self.forward(batch.input_ids, batch.labels, batch.position_ids)

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the last hidden states [n, S, h] of a batch, in the matmul dtype. The first call keeps a copy of the head, for
        `evaluate_tokens`. The model must be in eval mode and have a ``logits_map``."""
        return self._in_matmul_dtype(self.forward(batch.input_ids, None, batch.position_ids))

    def _in_matmul_dtype(self, hidden: Tensor) -> Tensor:
        with self.autocast():
            device = hidden.device.type
            return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden

    @torch.no_grad()
    def evaluate_tokens(self, batch: Batch, base_hidden: Tensor | None = None, *, with_hidden: bool = False) -> Scores:
        """Return the loss of a batch and of each of its tokens; also KL(base ‖ now), if ``base_hidden`` has the `hidden_states`
        of the base model, and with ``with_hidden`` the states of this model. The model must be in eval mode."""
        given = (batch.input_ids, batch.labels, batch.position_ids)
        scores: Scores = self.forward(*given, by_token=True, base_hidden=base_hidden, with_hidden=with_hidden)
        hidden = None if scores.hidden is None else self._in_matmul_dtype(scores.hidden)
        return Scores(scores.loss, scores.nats, scores.kl, hidden)

    @torch.no_grad()
    def evaluate_rows(self, batch: Batch) -> Tensor:
        """Return the loss of each row of a batch and the number of its targets that have the largest logit, fp32 [n, 2] on the
        device. The model must be in eval mode."""
        return self.forward(batch.input_ids, batch.labels, batch.position_ids, by_row=True)

    @torch.no_grad()
    def next_tokens(self, input_ids: Tensor, ends: Tensor) -> Tensor:
        """Return the most likely token after position ``ends[i]`` of row i of ``input_ids`` [n, S], as int64 [n].

        The model must be in eval mode. If the model is sharded this is a collective, and all ranks must pass the same
        shapes.
        """
        return self.forward(input_ids, ends=ends).argmax(-1)

    def forward(self, *inputs: Tensor | None, **more: Any) -> Any:
        """Run a forward without a backward. For the result see `LanguageModel.forward`."""
        with self.autocast():
            found = self.model(*inputs, **more)
        self.alive()
        return found


class Engine(EngineState, InferenceEngine):
    """Model and optimizer as this rank holds them. This class itself is for one process with full parameters; a strategy
    that uses several ranks derives from it.

    Attributes:
        step_module: the module that is called in a training step (default: the model).
        grad_clip: maximal gradient norm of `train_step` (``None``: gradients are not clipped).
        replicas: the number of ranks over which the strategy averages gradients; the loss is multiplied by it.
        sharded_export: whether the final model is written by all ranks instead of one.
        has_gradients: whether every parameter has its gradient (or shard of it) in ``grad`` at the optimizer's step.
        skipped: number of steps without an update (int64, 0-d, on the device).
        timer: times the parts of a step.
        term: the term that the objective adds to the cross entropy (``None``: none).
    """

    has_gradients = True
    term: Term | None = None

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        precision: Precision,
        world: DistributedContext,
        grad_clip: float | None = None,
        step_module: nn.Module | None = None,
        replicas: int = 1,
        sharded_export: bool = False,
    ) -> None:
        super().__init__(model, precision=precision, world=world)
        check_usable(optimizer)
        self.optimizer = combined(optimizer)
        self.optimizer_state = OptimizerState(model, self.optimizer, world)
        self.grad_clip = grad_clip
        self.step_module = model if step_module is None else step_module
        self.replicas = replicas
        self.sharded_export = sharded_export
        self.scaler = precision.grad_scaler(world.device.type)
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.timer = StepTimer(on_device=world.device.type == "cuda")
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        thawed = model.transformed.thaw_at if model.transformed is not None else {}
        self._thaw_at = [(thawed[name], p) for name, p in model.hf_named_parameters() if name in thawed]
        rows = model.transformed.first_rows if model.transformed is not None else {}
        self._first_rows = [(*rows[name], p) for name, p in model.hf_named_parameters() if name in rows]
        self._frozen: list[nn.Parameter] = []
        self._frozen_rows: list[tuple[nn.Parameter, int]] = []
        # Fused optimizers can skip an update on the device. They can't for parameters on the host, to which torch copies
        # found_inf without waiting for the copy. There the host reads the decision, which is free on a CPU only.
        self.decides_on_device = world.device.type != "cpu" and all(
            group.get("fused") and all(p.device.type == world.device.type for p in group["params"])
            for group in self.optimizer.param_groups
        )

    @property
    def loss_scale(self) -> Tensor | float | None:
        """The factor of the loss scaler, on the device; ``None`` without a scaler."""
        return self.scaler.scale_on(self.world.device)

    # -- one step -----------------------------------------------------------------------------------------------------

    def train_step(
        self,
        batch: Batch,
        *,
        should_skip: Callable[[Tensor, Tensor], Tensor] | None = None,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> StepOutput:
        """Train on this rank's share of a global batch. Nothing here waits for the device.

        Args:
            batch: the share, which is split into its micro-batches.
            should_skip: maps loss and gradient norm to a 0-d bool, equal on all ranks: whether weights and moments must
                not change. By default no update is skipped.
            heartbeat: called after every micro-batch.
        """
        tokens = self.count_targets(batch)
        divisor = self.loss_divisor(batch, tokens)
        micro_batches = batch.micro_batches()
        loss = torch.zeros((), device=self.world.device)
        # A signal to the process group would kill a compiler that is started here. Another thread receives the signal.
        blocked = signals_blocked() if self.model.is_compiled else nullcontext()
        with self.timer.part("compute"), blocked:
            for i, micro_batch in enumerate(micro_batches, start=1):
                on_device = micro_batch.to(self.world.device)
                loss += self.backward(on_device, tokens=divisor, last=i == len(micro_batches))
                heartbeat()
        with self.timer.part("communication"):
            self.world.data_all_reduce_sum(loss)
        with self.timer.part("optimizer"):
            norm = self.step(self.grad_clip, refuse=never if should_skip is None else partial(should_skip, loss))
        terms = {} if self.term is None else {self.term.name: self.term.take(self, divisor)}
        return StepOutput(loss, norm, tokens, terms)

    def skip_step(self, batch: Batch) -> StepOutput:
        """Count a step that does not train on ``batch``; its loss and norm are NaN."""
        self.skipped += 1
        nothing = torch.full((), torch.nan, device=self.world.device)
        return StepOutput(nothing, nothing, self.count_targets(batch))

    def count_targets(self, batch: Batch) -> int:
        """Return the number of target tokens of the global batch, of which ``batch`` is this rank's share."""
        with self.timer.part("communication"):
            return self.world.data_sum(batch.num_targets)

    def loss_divisor(self, batch: Batch, tokens: int) -> float:
        """Return the number by which the summed loss of the global batch is divided: that of its target ``tokens``, or the sum
        of their weights. It is 1 where all weights are 0, so that the loss is 0."""
        if batch.loss_weights is None:
            return tokens
        with self.timer.part("communication"):
            return self.world.data_sum(batch.sum_of_weights) or 1.0

    def backward(self, batch: Batch, *, tokens: float, last: bool) -> Tensor:
        """Accumulate the gradients of one micro-batch; return its part of the global mean loss, on the device.

        ``tokens`` is the number of target tokens of the global batch, or the sum of their weights. ``last`` marks the
        last micro-batch of a step.
        """
        with self.communication(last):
            loss, reported = self.losses(batch)
            self.scaler.scale(loss / tokens * self.replicas).backward()
        return reported / tokens

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a micro-batch with the objective's term, and the cross entropy alone, detached."""
        if self.term is not None:
            return self.term.losses(self, batch)
        loss = self.cross_entropy(batch)
        return loss, loss.detach()

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Return the summed cross entropy of a micro-batch of a training step."""
        with self.autocast():
            loss = self.step_module(batch.input_ids, batch.labels, batch.position_ids, batch.loss_weights)
        return loss.sum()

    def cross_entropy_and_kl(self, batch: Batch, base_hidden: Tensor, temperature: float) -> Tensor:
        """Return the summed cross entropy of a micro-batch of a training step and its summed KL(base ‖ now), fp32 [2].
        ``base_hidden`` are the `hidden_states` of the base model."""
        given = (batch.input_ids, batch.labels, batch.position_ids, batch.loss_weights)
        with self.autocast():
            found = self.step_module(*given, base_hidden=base_hidden, temperature=temperature)
        return found.sum(0)

    def communication(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of one micro-batch's forward and backward. With ``last``, gradients must be reduced in it."""
        return nullcontext()

    def step(self, max_norm: float | None, *, refuse: Callable[[Tensor], Tensor] = never) -> Tensor:
        """Clip the gradients to the global norm ``max_norm`` (``None``: measure only), update the weights and clear the
        gradients; return the norm, on the device.

        ``refuse`` maps the norm to a 0-d bool, equal on all ranks: whether weights and moments must not change. Such a step
        counts in ``skipped``, as does a step with a non-finite gradient under 16-mixed.
        """
        self._drop_frozen()
        self.scaler.unscale_(self.optimizer)
        if self.term is not None:
            self.term.add_gradients(self)
        norm = self.clip(max_norm)
        if self.scaler.is_enabled():
            norm = self._sync_infinite(norm)
        refused = refuse(norm)
        self.update(refused)
        self.skipped += refused | ~torch.isfinite(norm) if self.scaler.is_enabled() else refused
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _drop_frozen(self) -> None:
        """Clear the gradients of what `set_progress` has frozen."""
        for parameter in self._frozen:
            parameter.grad = None
        for parameter, row in self._frozen_rows:
            if parameter.grad is not None:
                tensors.local(parameter.grad)[: max(0, row - tensors.start_of(parameter))] = 0

    def _sync_infinite(self, norm: Tensor) -> Tensor:
        """Make the loss scaler of every rank skip the update if one rank has found an infinite gradient or a ``norm`` that is
        not finite. Return the norm, or NaN if only another rank's gradients are infinite."""
        finite = torch.isfinite(norm)
        found = [
            self.world.all_reduce_max(flag.copy_(torch.maximum(flag, (~finite).to(flag))))
            for flag in self.scaler.found_inf(self.optimizer)
        ]
        infinite = torch.stack([flag.to(self.world.device) for flag in found]).sum() > 0
        return torch.where(infinite & finite, torch.nan, norm)

    def update(self, refused: Tensor) -> None:
        """Run the optimizer's step, unless ``refused``, and update the scaler.

        The host does not wait for a GPU: ``refused`` is passed on the device through the optimizer's attribute
        ``found_inf``, by which a loss scaler reports infinite gradients.
        """
        if self.decides_on_device:
            hook = self.optimizer.register_step_pre_hook(partial(_skip_update, refused))
            self.scaler.step(self.optimizer)
            hook.remove()
            vars(self.optimizer).pop("found_inf", None)
        elif not refused:
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip the gradients to the norm ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does, over all shards of all
        parameters. Return their norm before, on the device, also if parameters are on the host."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self.norm(parameters)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm.to(self.world.device, non_blocking=True)

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of ``parameters``, over all their shards."""
        return norm_of(parameters)

    def set_progress(self, share: float) -> None:
        """Keep the parameters and rows as they are that a transform has frozen up to a later share of the run than ``share``.
        They do not count in the gradient norm, and parameters have no optimizer state before their first update."""
        self._frozen = [parameter for until, parameter in self._thaw_at if share < until]
        self._frozen_rows = [(p, row) for row, until, p in self._first_rows if until is None or share < until]

    def set_lr(self, schedule: Callable[[int], float], step: int) -> float:
        """Set every parameter group's learning rate for update ``step`` (0-based); return the first group's.

        It is the group's ``lr`` when the optimizer was built × the multiplier of ``schedule`` × the group's ``lr_factor``, if
        it has one, without which it is returned. A group with the key ``schedule`` has its own multiplier: a function of
        the step or, if the run's is a `Schedule`, also of its ``total_steps`` and ``warmup_steps``.
        """
        rates = []
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            own = group.get("schedule")
            multiplier = schedule if own is None else with_multiplier(schedule, own)
            rates.append(base * multiplier(step))
            group["lr"] = rates[-1] * group.get("lr_factor", 1.0)
        return float(rates[0])

    # -- state --------------------------------------------------------------------------------------------------------

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every full weight, one at a time, with its Hugging Face name. This is a collective: every rank must iterate
        over all of them."""
        for name, tensor in self.model.hf_state().items():
            yield name, tensors.full_tensor(tensor.detach())


def _skip_update(refused: Tensor, optimizer: Any, args: Any, kwargs: Any) -> None:
    """A hook before the optimizer's step, which makes it skip the update if ``refused`` or if the scaler requires it."""
    found = refused.float()
    by_scaler = getattr(optimizer, "found_inf", None)
    optimizer.found_inf = found if by_scaler is None else torch.maximum(found, by_scaler)
