"""The events that the training loop emits to its listeners. Events are frozen: a listener observes and never steers.

Tensors in an event stay on the device. Only a listener that needs their values reads them, at a log step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain.telemetry.metric import Metric
from pretrain.telemetry.step_timer import StepTimes

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.telemetry.history import History


@dataclass(frozen=True, slots=True)
class Event:
    """The base class of all events. ``step`` is the number of optimizer steps done when the event happened."""

    step: int


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run was started or resumed.

    Attributes:
        total_steps: Number of optimizer steps of the whole run.
        resumed: Whether the run was loaded from a checkpoint.
        pending_evaluation: Whether this step will be evaluated, even if metrics.jsonl already has scores of it.
        records: Records that were saved with the checkpoint. metrics.jsonl may lack them after a full disk or the loss of
            a machine.
        facts: Metadata that is written to run.json (world size, strategy, versions, number of parameters, …).
        history: The aggregate of the run's records up to this step, for sinks; the monitor adds each record before the
            sinks get it. ``None`` in the event that the trainer emits.
    """

    total_steps: int
    resumed: bool
    pending_evaluation: bool = False
    records: tuple[dict[str, Any], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    history: History | None = None


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """The norms of every layer, reduced over the shards of all ranks.

    ``norms`` is fp32 [len(names), 4] on the device. Its columns are the weight norm (before the update), the gradient norm
    (before clipping), the norm of the update, and the ratio of the update norm to the weight norm."""

    names: tuple[str, ...]
    norms: Tensor


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One optimizer step was done.

    Attributes:
        epoch: Epoch of the step's last sample, as a fraction.
        tokens: Target tokens so far, summed over all ranks.
        step_tokens: Target tokens of this step, summed over all ranks.
        loss: Loss of the step in nats per target token, a 0-d tensor.
        lr: Learning rate of the step.
        grad_norm: Norm of the gradient before clipping, a 0-d tensor.
        skipped: Number of steps without an update so far, a 0-d tensor.
        step_samples: Sequences of this step, summed over all ranks.
        times: How long each part of the step took on this rank.
        loss_scale: Loss scale of fp16; ``None`` without a gradient scaler.
        layers: Norms of every layer, if they were recorded at this step.
        terms: Value of the term that the objective adds to the loss, by its name, a 0-d tensor.
    """

    epoch: float
    tokens: int
    step_tokens: int
    loss: Tensor
    lr: float
    grad_norm: Tensor
    skipped: Tensor
    step_samples: int = 0
    times: StepTimes = field(default_factory=StepTimes)
    loss_scale: Tensor | float | None = None
    layers: LayerNorms | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceCount:
    """The ``tokens`` of one source that the run has read so far, over all epochs, and the ``documents`` that start in
    them."""

    tokens: int
    documents: int


@dataclass(frozen=True, slots=True)
class PartCount:
    """What a run has read of one part of its training data.

    Attributes:
        tokens: target tokens so far.
        share: their share in the target tokens of all parts.
        wanted: the share that the weights ask for, over the run so far.
        epochs: passes over the part so far.
    """

    tokens: int
    share: float
    wanted: float
    epochs: float


@dataclass(frozen=True, slots=True)
class DataStatisticsEvent(Event):
    """The data that the run has read up to this step, by source and by part. ``seconds`` is how long counting blocked the
    loop."""

    sources: dict[str, SourceCount]
    seconds: float
    parts: dict[str, PartCount] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PositionLosses:
    """The loss of a domain by the position of its tokens.

    Attributes:
        width: Positions in a bucket; bucket i has the positions from i × ``width`` on.
        loss: Mean loss of each bucket in nats per token; ``None`` without a token.
        tokens: Number of target tokens of each bucket.
    """

    width: int
    loss: tuple[float | None, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DomainScore:
    """The scores of one domain at one evaluation.

    Attributes:
        domain: Name of the domain.
        role: ``new`` (the run trains on it) or ``base`` (the run may forget it).
        loss: Mean loss in nats per target token.
        perplexity: ``exp(loss)``, per token of the model's own tokenizer.
        bits_per_byte: Loss in bits per byte of text; ``None`` if the number of bytes is unknown.
        tokens: Number of target tokens that were scored.
        delta_loss: Change of the loss since step 0 (the base model before this run); ``None`` if step 0 was not scored on
            the same tokens.
        delta_reason: Why ``delta_loss`` is ``None``.
        digest: Digest of the tokens and of the settings they were scored with. Two losses are comparable only if their
            digests are equal.
        kl_to_base: Mean KL(base ‖ now) in nats per token, of the next-token distributions of the base model (before this
            run) and of the model now, on the first ``evaluation.kl_tokens`` tokens; ``None`` if it was not measured.
        in_context_gain: How much lower the loss of random tokens is when their span is repeated in the context (nats per
            token). It belongs to the model and is the same for every domain; ``None`` if it was not measured.
        positions: The loss by position, in a record of its own; ``None`` if it was not measured.
    """

    domain: str
    role: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    delta_loss: float | None = None
    delta_reason: str | None = None
    digest: str | None = None
    kl_to_base: float | None = None
    in_context_gain: float | None = None
    positions: PositionLosses | None = None


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """All domains were scored. ``seconds`` is the duration of the evaluation."""

    scores: tuple[DomainScore, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class MergePoint:
    """The scores of the model ``alpha`` × result + (1 - ``alpha``) × base model. ``checkpoint`` is the step of the checkpoint
    that stands for the result; ``None``: the result itself."""

    alpha: float
    scores: tuple[DomainScore, ...]
    checkpoint: int | None = None


@dataclass(frozen=True, slots=True)
class MergeCurve(Event):
    """Points between the base model and the result of the run, or its checkpoints, were scored. ``chosen`` is the point that is
    exported; ``None``: the result itself."""

    points: tuple[MergePoint, ...]
    chosen: MergePoint | None


@dataclass(frozen=True, slots=True)
class MetricsEvent(Event):
    """The evaluation tasks have measured ``metrics``. This event follows `Evaluated` of the same evaluation; its ``seconds``
    are not part of that event's."""

    metrics: tuple[Metric, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation of a prompt. ``text`` follows ``prompt``; ``role`` is new · base · user (a prompt of the user's
    own)."""

    domain: str
    role: str
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Sampled(Event):
    """Samples were generated. This event follows `Evaluated` of the same evaluation; its ``seconds`` are not part of that
    event's."""

    samples: tuple[Sample, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """The checkpoint of ``step`` is complete; the event may be emitted some steps later. ``seconds`` is how long writing
    took, ``blocked_seconds`` how long it blocked the loop."""

    path: Path
    seconds: float
    blocked_seconds: float
    bytes: int


@dataclass(frozen=True, slots=True)
class TrainingPaused(Event):
    """The training loop was blocked for ``seconds`` by saving a checkpoint (with its model folder), or by an evaluation that
    a stop signal ended. This event is emitted at once, even if the checkpoint becomes complete later."""

    seconds: float
    for_: Literal["evaluation", "checkpoint"]


@dataclass(frozen=True, slots=True)
class RolledBack(Event):
    """The run was rolled back to ``step``, its last good checkpoint, and continues from there. The guard found the fault
    ``reason`` (nonfinite · spike) in ``bad_step``."""

    bad_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """The run has ended. ``status`` is finished · stopped · failed; ``model`` is the exported Hugging Face folder, if
    any; ``stopped_by`` is the reason if a rule of ``stop_when`` has ended it before its last step."""

    status: str
    tokens: int
    model: Path | None = None
    stopped_by: str | None = None
