"""The training loop: resume, then train, evaluate and save batch by batch. Read `Trainer.run` first; it calls the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint import schema, store
from pretrain.checkpoint.rng import rng_state, set_rng_state
from pretrain.checkpoint.train_state import TrainState
from pretrain.data.batch import Batch
from pretrain.data.statistics import DataStatistics
from pretrain.distributed.sharding import TensorFiles
from pretrain.runtime.console import notice
from pretrain.runtime.out_of_memory import watched
from pretrain.runtime.signals import signals_blocked
from pretrain.runtime.watchdog import Watchdog
from pretrain.telemetry.events import (
    DataStatisticsEvent,
    Evaluated,
    Event,
    RolledBack,
    RunFinished,
    RunStarted,
    Sampled,
    StepDone,
    TrainingPaused,
)
from pretrain.telemetry.interval import Interval
from pretrain.telemetry.record import fields_of
from pretrain.telemetry.step_timer import StepTimer
from pretrain.training.guard.replicas import check_replicas

if TYPE_CHECKING:
    from pretrain.checkpoint.writer import AsyncCheckpointWriter
    from pretrain.data.loader import Loader
    from pretrain.distributed.context import DistributedContext
    from pretrain.evaluation.samples import Sampler
    from pretrain.evaluation.untouched import Untouched
    from pretrain.runtime.signals import Interrupt
    from pretrain.strategy.engine import Engine
    from pretrain.training.exporter import Exporter
    from pretrain.training.guard.guard import BadStep, Guard
    from pretrain.training.layer_statistics import LayerStatistics

Schedule = Callable[[int], float]
Listener = Callable[[Event], None]


@dataclass
class Trainer:
    """The training loop and everything it works with.

    Attributes:
        world: the ranks of this run and their collectives.
        engine: the model and the optimizer under one strategy.
        loader: yields this rank's share of one global batch per step.
        schedule: maps a step to the factor of the learning rate.
        guard: detects bad steps (non-finite numbers, loss spikes) and decides what to do about them.
        untouched: evaluates, and keeps the losses of the base model (before training) as the baseline of forgetting.
        sampler: continues the prompts at every evaluation.
        saver: writes checkpoints.
        interrupt: whether a stop signal has arrived.
        identity: what a checkpoint must have in common with the run that resumes from it.
        rng: this rank's random state at the first step of this start.
        total_steps: length of the run in optimizer steps.
        micro_batch: sequences per micro-batch.
        grad_clip: maximal gradient norm (``None``: gradients are not clipped).
        evaluate_every: interval of evaluations in steps.
        save_every: interval of checkpoints in steps.
        exporter: writes the model as Hugging Face folders.
        layers: measures the norms of each layer.
        resume_from: the checkpoint folder to resume from, or ``None``.
        unsaved_records: returns the records since the last checkpoint, which the next checkpoint will hold.
        records: the records in the checkpoint that the run resumes from, if it is a checkpoint of this run.
        facts: metadata of the run for run.json.
        listeners: receive every event; only rank 0 has any.
        progress: how far the run has come; saved with every checkpoint.
        watchdog: ends the process if the run makes no progress.
        clock: times the parts of a step.
        census: counts what has been read; rank 0 reports it.
    """

    world: DistributedContext
    engine: Engine
    loader: Loader
    schedule: Schedule
    guard: Guard
    untouched: Untouched
    sampler: Sampler
    saver: AsyncCheckpointWriter
    interrupt: Interrupt
    identity: dict[str, Any]
    rng: dict[str, Any]
    total_steps: int
    micro_batch: int
    grad_clip: float | None
    evaluate_every: Interval
    save_every: Interval
    exporter: Exporter
    layers: LayerStatistics
    resume_from: Path | None = None
    unsaved_records: Callable[[], list[dict[str, Any]]] = list
    records: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    listeners: list[Listener] = field(default_factory=list)
    progress: TrainState = field(default_factory=TrainState)
    watchdog: Watchdog = field(default_factory=Watchdog)
    clock: StepTimer = field(init=False)
    census: DataStatistics = field(init=False)
    _batches: Generator[Batch, None, None] = field(init=False)
    _rollback_step: int = 0  # the step of the last rollback's checkpoint
    _announced: bool = False  # whether this start has announced what an evaluation scores
    _save_due: bool = False
    _started_at_step: int = 0

    def __post_init__(self) -> None:
        self.clock = StepTimer(on_device=self.world.device.type == "cuda")
        self.census = DataStatistics(self.loader)

    def run(self) -> TrainState:
        """Train to ``total_steps`` or until a stop signal; save, and export the model of a finished run."""
        self.resume()
        resumed, self._started_at_step = self.resume_from is not None, self.progress.step
        self.emit(
            RunStarted(
                *(self.progress.step, self.total_steps, resumed, self.progress.pending_evaluation),
                records=tuple(self.records),
                facts=self.facts,
            )
        )
        set_rng_state(self.rng)  # only now, because listeners may draw random numbers while they start
        pending = self.progress.pending_evaluation
        if (self.progress.step == 0 or pending) and self.evaluate() and pending:
            self.save(at_once=self.finished)  # replaces the checkpoint without these scores
        for batch in self.batches():
            self.emit(self.train_step(batch))
            stop = self.sync_stop_signal()
            if self.rolled_back(at_once=stop or self.pauses):
                continue
            if self.evaluate_every.due(self.progress.step) or self.finished:
                stop = not self.evaluate() or stop
            if self.save_is_due() or self.finished or stop:
                self.save(at_once=self.finished or stop)  # after the evaluation, so that a resumed run never repeats it
            if stop:
                break
        return self.finish()

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's share of the global batches up to the last step."""
        if self.finished or self.interrupted():
            return
        self._batches = iter(self.loader)
        self.watchdog.allow_slow()  # the first step compiles
        while not self.finished:
            with self.clock.part("data"):
                batch = next(self._batches)
            yield batch

    @watched("step")
    def train_step(self, batch: Batch) -> StepDone:
        """Take one optimizer step on one global batch, unless the batch is blocklisted. Nothing here waits for the device."""
        with self.clock.part("communication"):
            tokens = self.world.sum(batch.num_targets)
        lr = self.engine.set_lr(self.schedule, self.progress.step)
        if self.guard.is_blocklisted(batch.first_sample):
            loss = norm = torch.full((), math.nan, device=self.world.device)
            self.engine.skipped += 1
        else:
            loss, norm = self.update(batch, tokens)
        self.progress.step += 1
        self.progress.samples = self.loader.state_dict()["samples"]
        self.progress.tokens += tokens
        return StepDone(
            self.progress.step,
            epoch=self.loader.epoch,
            tokens=self.progress.tokens,
            step_tokens=tokens,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            skipped=self.engine.skipped,
            step_samples=self.loader.global_batch_size,
            times=self.clock.take(),
            loss_scale=self.engine.loss_scale,
            layers=self.layers.take(),
        )

    def update(self, batch: Batch, tokens: int) -> tuple[Tensor, Tensor]:
        """Train on ``batch`` unless the guard rejects the update; return loss and gradient norm, on the device.

        ``tokens`` is the number of target tokens of the global batch.
        """
        micros = list(batch.split(self.micro_batch))
        loss = torch.zeros((), device=self.world.device)
        # A signal to the process group would kill a compiler that is started here. Another thread receives the signal.
        blocked = signals_blocked() if self.engine.model.is_compiled else nullcontext()
        with self.clock.part("compute"), blocked:
            for i, micro in enumerate(micros):
                loss += self.engine.backward(micro.to(self.world.device), tokens=tokens, last=i == len(micros) - 1)
                self.watchdog.heartbeat()
        with self.clock.part("communication"):
            self.world.all_reduce_sum(loss)
        check = self.guard.check(loss)
        with self.clock.part("optimizer"):
            norm = self.layers.step(self.progress.step + 1, self.grad_clip, refuse=check.should_skip)
        self.guard.note(check, norm, step=self.progress.step + 1, first_sample=batch.first_sample)
        return loss, norm

    def rolled_back(self, *, at_once: bool) -> bool:
        """Read the bad steps that the guard has found; return whether the run was rolled back to a checkpoint."""
        rollbacks = (bad for bad in self.guard.found(at_once=at_once) if bad.action == "rollback")
        return any(self.roll_back(bad) for bad in rollbacks)

    def roll_back(self, bad: BadStep) -> bool:
        """Continue from the last good checkpoint. Return False if there is none yet; then the step is only skipped."""
        self.saver.wait()
        self.emit_saved()
        # If no step was trained since the last rollback, that checkpoint did not help: use an older one.
        below = None if self.guard.trained_since_rollback else self._rollback_step
        newest = self.saver.store.newest
        checkpoint = self.world.on_main_rank(lambda: newest(below=below) or newest()) or self.resume_from
        if checkpoint is None:
            notice("there is no checkpoint to roll back to yet: the step is skipped and the run continues")
            return False
        self._batches.close()
        with self.watchdog.slow():
            self.restore(checkpoint)
        self.progress.pending_evaluation = False  # this run evaluated at that step before it continued
        self.guard.last_step_skipped, self.guard.trained_since_rollback = True, False
        self._rollback_step = self.progress.step
        self._batches = iter(self.loader)
        notice(f"rolled back to {checkpoint}")
        self.emit(RolledBack(self.progress.step, bad.step, bad.reason))
        set_rng_state(self.rng)
        return True

    @watched("evaluation")
    def evaluate(self) -> bool:
        """Score every domain and continue the prompts. A run's first scores are the baseline of its forgetting.

        Return False if a stop signal interrupted the evaluation, which must then be run again on resume.
        """
        self.watchdog.allow_slow()
        started_at = time.perf_counter()
        progress = self.progress
        untouched = progress.step == 0
        baseline = None if untouched else self.untouched.known(progress)
        announce, self._announced = not self._announced, True
        scores = self.untouched.evaluator.run(self.engine, baseline=baseline, announce=announce, **self.hooks)
        scored_at = time.perf_counter()
        samples = None if scores is None else self.sampler.run(self.engine, **self.hooks)
        progress.pending_evaluation = samples is None
        if scores is None or samples is None:
            self.emit(TrainingPaused(progress.step, time.perf_counter() - started_at, "evaluation"))
            return False
        sampled_at = time.perf_counter()
        progress.losses, progress.evaluated_at = {s.domain: s.loss for s in scores}, progress.step
        progress.scores = [fields_of(s) for s in scores]
        if untouched:
            self.untouched.keep(progress, scores)
        self.emit(Evaluated(progress.step, tuple(scores), scored_at - started_at))
        self.emit(Sampled(progress.step, tuple(samples), sampled_at - scored_at))
        self.emit_data()
        return True

    def emit_data(self) -> None:
        """Emit the statistics of the data read so far. Only rank 0 counts and emits them."""
        if self.world.is_main and self.progress.samples:
            started_at = time.perf_counter()
            sources = self.census.at(self.progress.samples)
            self.emit(DataStatisticsEvent(self.progress.step, sources, time.perf_counter() - started_at))

    def save(self, *, at_once: bool) -> None:
        """Make a checkpoint of the present state. It is written while training continues, or ``at_once`` before returning."""
        self._save_due = False
        started_at = time.perf_counter()
        if self.guard.policy.replicas == "stop":
            check_replicas(self.engine, self.progress.step)
        state = {
            "engine": self.engine.state_dict(),
            "loader": self.loader.state_dict(),
            "progress": self.progress.state_dict(),
            "guard": self.guard.state_dict(),
            "rng": self.world.all_gather_object(rng_state),
            "identity": self.identity,
            "records": self.unsaved_records(),
            "files": self.exporter.checkpoint_files(self.progress) if self.world.is_main else {},
        }
        saved = self.saver.save(self.progress.step, state, at_once=at_once)
        if saved and not self.finished:  # `finish` exports the last model
            with self.watchdog.slow():
                self.exporter.at_save(self.progress)
        self.emit(TrainingPaused(self.progress.step, time.perf_counter() - started_at, "checkpoint"))
        self.emit_saved()

    def save_is_due(self) -> bool:
        """Return whether a checkpoint is due. After a skipped step it is delayed until a step has been trained."""
        self._save_due |= self.save_every.due(self.progress.step)
        return self._save_due and not self.guard.last_step_skipped

    def emit_saved(self) -> None:
        while (saved := self.saver.collect()) is not None:
            self.emit(saved)

    def sync_stop_signal(self) -> bool:
        """Return whether any rank has received a stop signal.

        Raises the error that prevented a checkpoint from being written.
        """
        with self.clock.part("communication"):
            stop, failed = self.world.any_rank(self.interrupt.requested, self.saver.failed)
        if failed:
            self.saver.wait()
            self.world.sum(0)  # the error was raised on another rank, whose exit ends the group
            raise RuntimeError("another rank could not write its part of a checkpoint")
        self.emit_saved()
        return stop

    def flush(self) -> None:
        """Before a failed run ends, complete the checkpoint that is being written and report it, or report its error."""
        self.saver.close()
        try:
            self.emit_saved()
        except Exception as error:
            notice(f"error: {error}")
            self.emit_saved()

    def resume(self) -> None:
        """Restore the state of ``resume_from``; without one the run starts at step 0."""
        if self.resume_from is not None:
            self.score_untouched(self.resume_from)
            self.restore(self.resume_from)

    @watched("evaluation")
    def score_untouched(self, checkpoint: Path) -> None:
        """Score the initial weights before those of ``checkpoint`` replace them, if its baseline was measured on other text
        than this run evaluates."""
        self.watchdog.allow_slow()
        self.untouched.score_again(self.engine, schema.read_state(checkpoint), self.identity, **self.hooks)

    def restore(self, checkpoint: Path) -> None:
        """Restore the state of ``checkpoint``.

        The checkpoint may have been written by another strategy or number of ranks; a rank without a saved random state
        keeps its own.
        """
        state = store.load(checkpoint)
        before = state["identity"]
        if any(before[part] != self.identity[part] for part in ("weights", "optimizer")):  # allowed by resume_allow
            state["engine"] |= {"optimizer": TensorFiles([]), "optimizer_values": None}
            if self.world.is_main:
                notice(
                    "the optimizer state starts empty: the saved moments belong to another optimizer or dtype of weights"
                )
        self.engine.load_state_dict(state["engine"])
        self.progress.load_state_dict(state["progress"])
        self.untouched.restore(self.progress)
        # resume_allow may permit another sequence length: continue at the same place in the text.
        self.progress.samples = self.progress.samples * before["sequence_length"] // self.identity["sequence_length"]
        self.loader.load_state_dict({"samples": self.progress.samples})
        guard = state.get("guard", {})
        if any(before[part] != self.identity[part] for part in ("data", "sequence_length", "global_batch", "seed")):
            guard["passed_over"] = []  # the first samples belong to other batches
        self.guard.load_state_dict(guard)
        own = checkpoint.resolve().parent == self.saver.store.folder.resolve()
        self.records = state.get("records", []) if own else []  # another run's records are in its own files
        if self.world.rank < len(state["rng"]):
            self.rng = state["rng"][self.world.rank]

    def finish(self) -> TrainState:
        """Export the model if the run is complete, and emit how the run ended."""
        self.saver.close()
        self.sync_stop_signal()  # reports the last save, after which there was no step, or raises its error
        if self.progress.step not in (self.progress.evaluated_at, self._started_at_step):  # else it was already emitted
            self.emit_data()
        with self.watchdog.slow():
            model = self.exporter.at_end(self.progress) if self.complete else None
        status = "finished" if self.complete else "stopped"
        self.emit(RunFinished(self.progress.step, status, self.progress.tokens, model))
        return self.progress

    @property
    def hooks(self) -> dict[str, Callable[[], Any]]:
        """The callbacks that a long evaluation uses: whether to stop, and the watchdog's heartbeat."""
        return {"interrupted": self.interrupted, "alive": self.watchdog.heartbeat}

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps

    @property
    def complete(self) -> bool:
        """Whether only the export is left to do."""
        return self.finished and not self.progress.pending_evaluation

    @property
    def pauses(self) -> bool:
        """Whether the run evaluates, saves or ends at this step."""
        due = any(every.due(self.progress.step) for every in (self.evaluate_every, self.save_every))
        return self.finished or due or self._save_due

    def interrupted(self) -> bool:
        """Return whether any rank has received a stop signal. This is a collective."""
        return self.world.any_rank(self.interrupt.requested)[0]

    def emit(self, event: Event) -> None:
        self.watchdog.heartbeat()
        for listener in self.listeners:
            listener(event)
