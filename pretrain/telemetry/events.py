"""What the loop tells its listeners. Frozen: a listener watches and can never steer.

Tensors in an event stay on the device; only a listener that has something to show reads them, at a log step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain.telemetry.step_timer import StepTimes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Event:
    """``step``: optimizer steps done when the event happened."""

    step: int


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """``facts``: what stands in run.json (world size, strategy, versions, number of parameters, …). ``pending_evaluation``:
    this step is going to be evaluated, whatever is known of it from before. ``records``: those that came along with the
    checkpoint; a full disk or a lost machine may have kept them from metrics.jsonl."""

    total_steps: int
    resumed: bool
    pending_evaluation: bool = False
    records: tuple[dict[str, Any], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """``norms`` fp32 [len(names), 4] on the device: weight (before the update), gradient (before clipping), update, and
    update to weight of every layer, over the shards of all ranks."""

    names: tuple[str, ...]
    norms: Tensor


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One optimizer step. ``loss``, ``grad_norm`` and ``skipped`` (steps without an update so far) are 0-d tensors.

    ``tokens``: target tokens so far, all ranks. ``step_tokens``, ``step_samples``: those of this step. ``epoch``: of the
    step's last sample, as a fraction. ``times``: where the time of this rank's step went. ``loss_scale``: that of fp16,
    ``None`` without a scaler. ``layers``: where this step was looked at.
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


@dataclass(frozen=True, slots=True)
class SourceCount:
    """``tokens`` of one source that the run has read so far, all epochs, and ``documents`` that began in them."""

    tokens: int
    documents: int


@dataclass(frozen=True, slots=True)
class DataStatisticsEvent(Event):
    """What the run has read up to this step, by source. ``seconds``: how long the loop stood still to count it."""

    sources: dict[str, SourceCount]
    seconds: float


@dataclass(frozen=True, slots=True)
class DomainScore:
    """``loss`` in nats per target token. ``delta_loss`` is against step 0, the model before this run; ``None`` with a
    ``delta_reason`` where that was not scored on the same tokens. ``digest``: of the tokens and the settings with which
    they were scored; two losses can be compared where it is the same."""

    domain: str
    role: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    delta_loss: float | None = None
    delta_reason: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    scores: tuple[DomainScore, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """``text``: how the model goes on after ``prompt``. ``role``: new · base · user (a prompt of the user's own)."""

    domain: str
    role: str
    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Sampled(Event):
    """Told right after the scores of the same evaluation; ``seconds`` are not among theirs."""

    samples: tuple[Sample, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """The checkpoint of ``step`` has become whole, perhaps some steps later. ``blocked_seconds``: how long the loop stood
    still for it."""

    path: Path
    seconds: float
    blocked_seconds: float
    bytes: int


@dataclass(frozen=True, slots=True)
class TrainingPaused(Event):
    """``seconds`` that have gone by ``for_`` a checkpoint and the model folder beside it, or an evaluation that a stop
    signal has ended; told at once, whenever the checkpoint becomes whole."""

    seconds: float
    for_: Literal["evaluation", "checkpoint"]


@dataclass(frozen=True, slots=True)
class RolledBack(Event):
    """The run has gone back to ``step``, the last good checkpoint, because of what its guard found in ``bad_step``
    (``reason``: nonfinite · spike), and trains on from there."""

    bad_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """``status``: finished · stopped · failed. ``model``: the exported Hugging Face folder, if any."""

    status: str
    tokens: int
    model: Path | None = None
