"""The training loop: resume, then train, evaluate and save batch by batch. Read `Trainer.run` first; it calls the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.rng import rng_state, set_rng_state
from pretrain.checkpoint.train_state import TrainState
from pretrain.data.batch import Batch
from pretrain.data.statistics import DataStatistics
from pretrain.runtime.console import notice
from pretrain.runtime.out_of_memory import watched
from pretrain.runtime.signals import Interrupt
from pretrain.runtime.watchdog import Watchdog
from pretrain.telemetry.events import (
    DataStatisticsEvent,
    Event,
    MergeCurve,
    RolledBack,
    RunFinished,
    RunStarted,
    StepDone,
    TrainingPaused,
)
from pretrain.telemetry.interval import Interval
from pretrain.training.checkpoints import Checkpoints
from pretrain.training.final_model import export_final
from pretrain.training.guard.config import GuardConfig
from pretrain.training.guard.guard import BadStep, Guard
from pretrain.training.guard.replicas import check_replicas
from pretrain.training.hooks import Hooks
from pretrain.training.layer_statistics import LayerStatistics
from pretrain.training.stop_rule import StopWhen

if TYPE_CHECKING:
    from pretrain.data.loader import Loader
    from pretrain.distributed.context import DistributedContext
    from pretrain.evaluation.evaluation import Evaluation
    from pretrain.merging.curve import Curve
    from pretrain.strategy.engine import Engine
    from pretrain.training.exporter import Exporter
    from pretrain.training.hook import Hook

Schedule = Callable[[int], float]
Listener = Callable[[Event], None]


class Trainer:
    """The training loop. Every part that it works with has a default but the first four.

    Args:
        engine: the model and the optimizer under one strategy.
        loader: yields this rank's share of one global batch per step.
        schedule: maps a step to the factor of the learning rate.
        steps: length of the run in optimizer steps.
        evaluation: what is evaluated, and when. Default: nothing.
        checkpoints: saves and loads checkpoints. Default: none are saved.
        guard: detects bad steps and decides what to do about them. Default: the settings of `GuardConfig`.
        exporter: writes the model as Hugging Face folders. Default: it is not exported.
        layers: measures the norms of each layer. Default: they are not measured.
        hooks: keep state beside the model, by name. They may have been set up.
        stop_when: whether the run ends before its last step. Default: it does not.
        curve: scores points between the base model and the result at the end. Default: none.
        listeners: receive every event. Several processes: rank 0 alone has any.
        interrupt: whether a stop signal has arrived. Default: no signal is handled.
        watchdog: ends the process if the run makes no progress. Default: it is not watched.
        rng: this rank's random state at the first step of this start. Default: the present one.
        metadata: facts about the run, for run.json.

    Attributes:
        state: how far the run has come; saved with every checkpoint.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        schedule: Schedule,
        *,
        steps: int,
        evaluation: Evaluation | None = None,
        checkpoints: Checkpoints | None = None,
        guard: Guard | None = None,
        exporter: Exporter | None = None,
        layers: LayerStatistics | None = None,
        hooks: Hooks | Mapping[str, Hook] | None = None,
        stop_when: StopWhen | None = None,
        curve: Curve | None = None,
        listeners: Sequence[Listener] = (),
        interrupt: Interrupt | None = None,
        watchdog: Watchdog | None = None,
        rng: dict[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.loader, self.schedule, self.steps = engine, loader, schedule, steps
        self.evaluation, self.checkpoints, self.exporter = evaluation, checkpoints or Checkpoints(), exporter
        self.guard = guard or Guard(GuardConfig(), device=engine.world.device)
        self.layers = layers or LayerStatistics(engine, Interval(None))
        self.hooks = hooks if isinstance(hooks, Hooks) else Hooks(hooks or {}, engine.world)
        self.curve = curve
        self.stop_when = stop_when or StopWhen()
        self.listeners = list(listeners)
        self.interrupt, self.watchdog = interrupt or Interrupt(), watchdog or Watchdog()
        self.rng = rng_state() if rng is None else rng
        self.metadata = dict(metadata or {})
        self.state = TrainState()
        self.statistics = DataStatistics(loader)
        self._batches: Generator[Batch, None, None]
        self._started_at_step, self._started_at = 0, time.monotonic()
        self._seconds_before = 0.0  # of earlier starts
        self._pending_curve = False

    def run(self) -> TrainState:
        """Train up to the last step or until a stop signal; save, and export the model of a finished run."""
        self.start()
        pending = self.state.pending_evaluation
        if (self.state.step == 0 or pending) and self.evaluate() and pending:
            self.save(at_once=self.finished)  # replaces the checkpoint without these scores
        for batch in self.batches():
            self.emit(self.train_step(batch))
            stop = self.sync_stop_signal()
            if self.roll_back_if_needed(at_once=stop or self.pauses):
                continue
            if self.evaluation_is_due():
                stop = not self.evaluate() or stop
            if self.save_is_due() or self.finished or stop:
                self.save(at_once=self.finished or stop)  # after the evaluation, so that a resumed run never repeats it
            if stop:
                break
        return self.finish()

    def start(self) -> None:
        """Restore the checkpoint to resume from, if there is one, and announce the run."""
        self.hooks.setup(self.engine)
        checkpoint = self.checkpoints.resume_from
        if checkpoint is not None:
            self.capture_base()
            self.score_baseline_again()
            self.restore(checkpoint)
        step, pending = self.state.step, self.state.pending_evaluation
        records = tuple(self.checkpoints.records)
        self.emit(RunStarted(step, self.steps, checkpoint is not None, pending, records, facts=self.metadata))
        self._started_at_step, self._seconds_before = step, self.state.seconds
        set_rng_state(self.rng)  # only now, because listeners may draw random numbers while they start

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's share of the global batches up to the last step."""
        if self.finished or self.interrupted():
            return
        self._batches = iter(self.loader)
        self.watchdog.allow_slow()  # the first step compiles
        while not self.finished:
            with self.engine.timer.part("data"):
                batch = next(self._batches)
            yield batch

    @watched("step")
    def train_step(self, batch: Batch) -> StepDone:
        """Take one optimizer step on one global batch, unless the batch is blocklisted. Nothing here waits for the device."""
        engine, guard, state, number = self.engine, self.guard, self.state, self.state.step + 1
        lr = engine.set_lr(self.schedule, state.step)
        engine.set_progress(state.step / self.steps)
        self.layers.before_step(number)
        if guard.is_blocklisted(batch.first_sample):
            done = engine.skip_step(batch)
        else:
            done = engine.train_step(batch, should_skip=guard.should_skip, heartbeat=self.watchdog.heartbeat)
            guard.note(done.loss, done.grad_norm, step=number, first_sample=batch.first_sample)
        layers = self.layers.after_step(done.grad_norm)
        state.step, state.samples, state.tokens = number, self.loader.samples, state.tokens + done.tokens
        self.hooks.after_step(state, engine)
        return StepDone(
            number,
            epoch=self.loader.epoch,
            tokens=state.tokens,
            step_tokens=done.tokens,
            loss=done.loss,
            lr=lr,
            grad_norm=done.grad_norm,
            skipped=engine.skipped,
            step_samples=self.loader.global_batch_size,
            times=engine.timer.take(),
            loss_scale=engine.loss_scale,
            layers=layers,
            terms=done.terms,
        )

    def roll_back_if_needed(self, *, at_once: bool) -> bool:
        """Read the bad steps that the guard has found; return whether the run was rolled back to a checkpoint."""
        rollbacks = (bad for bad in self.guard.handle_bad_steps(at_once=at_once) if bad.action == "rollback")
        return any(self.roll_back(bad) for bad in rollbacks)

    def roll_back(self, bad: BadStep) -> bool:
        """Continue from the last good checkpoint. Return False if there is none yet; then the step is only skipped."""
        checkpoint = self.checkpoints.to_roll_back_to(below=self.guard.restore_below)
        self.emit_saved()
        if checkpoint is None:
            notice("there is no checkpoint to roll back to yet: the step is skipped and the run continues")
            return False
        self._batches.close()
        with self.watchdog.slow():
            self.restore(checkpoint)
        self.state.pending_evaluation = False  # this run evaluated at that step before it continued
        self.guard.note_rollback(self.state.step)
        self._batches = iter(self.loader)
        notice(f"rolled back to {checkpoint}")
        self.emit(RolledBack(self.state.step, bad.step, bad.reason))
        set_rng_state(self.rng)
        return True

    @watched("evaluation")
    def evaluate(self) -> bool:
        """Score every domain and continue the prompts. Return False if a stop signal interrupted the evaluation, which must
        then be run again on resume."""
        if self.evaluation is None:
            return True
        self.watchdog.allow_slow()
        started_at = time.perf_counter()
        events = self.evaluation.run(self.engine, self.state, last=self.ends_with, **self.callbacks)
        if events is None:
            self.emit(TrainingPaused(self.state.step, time.perf_counter() - started_at, "evaluation"))
            return False
        self.stop_when.note_evaluation(self.state)
        for event in events:
            self.emit(event)
        self.emit_data()
        return True

    def ends_with(self, evaluated: TrainState) -> bool:
        """Return whether the run ends with the state ``evaluated``, which is changed."""
        self.stop_when.note_evaluation(evaluated)
        return evaluated.step >= self.steps or self.stop_when.reason(evaluated) is not None

    def evaluation_is_due(self) -> bool:
        every = Interval(None) if self.evaluation is None else self.evaluation.every
        return every.due(self.state.step) or self.finished

    def emit_data(self) -> None:
        """Emit the statistics of the data read so far. Only rank 0 counts and emits them."""
        if self.world.is_main and self.state.samples:
            started_at, samples = time.perf_counter(), self.state.samples
            sources, parts = self.statistics.sources(samples), self.statistics.parts(samples)
            self.emit(DataStatisticsEvent(self.state.step, sources, time.perf_counter() - started_at, parts))

    def save(self, *, at_once: bool) -> None:
        """Make a checkpoint of the present state. It is written while training continues, or ``at_once`` before returning."""
        if self.checkpoints.writer is None:
            return
        started_at = time.perf_counter()
        if self.guard.policy.replicas == "stop":
            check_replicas(self.engine, self.state.step)
        state = {
            **self.hooks.added_to(self.engine.state_dict()),
            "loader": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
            "rng": self.world.gather_object(rng_state),  # rank 0 writes it
        }
        saved = self.checkpoints.save(self.state, state, at_once=at_once)
        if saved and self.exporter is not None and not self.finished:  # `finish` exports the last model
            with self.watchdog.slow():
                self.exporter.at_save(self.state)
        self.emit(TrainingPaused(self.state.step, time.perf_counter() - started_at, "checkpoint"))
        self.emit_saved()

    def save_is_due(self) -> bool:
        """Return whether a checkpoint is due. After a skipped step it is delayed until a step has been trained."""
        return self.checkpoints.is_due(self.state.step, delay=self.guard.last_step_skipped)

    def emit_saved(self) -> None:
        for saved in self.checkpoints.saved():
            self.emit(saved)

    def sync_stop_signal(self) -> bool:
        """Return whether any rank has received a stop signal.

        Raises the error that prevented a checkpoint from being written.
        """
        with self.engine.timer.part("communication"):
            over = self.stop_when.is_over(self.seconds)
            stop, failed, over = self.world.any_rank(self.interrupt.requested, self.checkpoints.failed, over)
        self.stop_when.note_seconds(self.state, self.seconds, over=over)
        if failed:
            self.checkpoints.close()
        self.emit_saved()  # raises this rank's error
        if failed:
            self.world.sum(0)  # the error was raised on another rank, whose exit ends the group
            raise RuntimeError("another rank could not write its part of a checkpoint")
        return stop

    def flush(self) -> None:
        """Before a failed run ends, complete the checkpoint that is being written and report it, or report its error."""
        self.checkpoints.close()
        try:
            self.emit_saved()
        except Exception as error:
            notice(f"error: {error}")
            self.emit_saved()

    @watched("evaluation")
    def capture_base(self) -> None:
        """Compute what evaluations need of the initial weights, which the engine has until a checkpoint is loaded."""
        if self.evaluation is not None:
            self.watchdog.allow_slow()
            self.evaluation.capture_base(self.engine, **self.callbacks)

    @watched("evaluation")
    def score_baseline_again(self) -> None:
        """Score the initial weights before those of a checkpoint replace them, if its baseline was measured on other text than
        this run evaluates."""
        if self.evaluation is not None:
            self.watchdog.allow_slow()
            saved, fingerprint = self.checkpoints.saved_state(), self.checkpoints.fingerprint
            self.evaluation.score_baseline_again(self.engine, saved, fingerprint, **self.callbacks)

    def restore(self, checkpoint: Path) -> None:
        """Restore the state of ``checkpoint``. A rank without a saved random state keeps its own."""
        saved = self.checkpoints.load(checkpoint, world=self.world)
        self.engine.load_state_dict(saved["engine"])
        self.state.load_state_dict(saved["progress"])
        self.loader.load_state_dict(saved["loader"])
        self.guard.load_state_dict(saved["guard"])
        self.hooks.load_state_dict(saved)
        if self.evaluation is not None:
            self.evaluation.restore(self.state)
        if self.world.rank < len(saved["rng"]):
            self.rng = saved["rng"][self.world.rank]

    def finish(self) -> TrainState:
        """Export the model if the run is complete, and emit how the run ended."""
        self.checkpoints.close()
        self.sync_stop_signal()  # reports the last save, after which there was no step, or raises its error
        if self.state.step not in (self.state.evaluated_at, self._started_at_step):  # else it was already emitted
            self.emit_data()
        curve = self.score_merge_curve()
        model = None
        if self.exporter is not None and self.complete:
            with self.watchdog.slow():
                model = export_final(self, self.exporter, curve)
        status = "finished" if self.complete else "stopped"
        stopped_by = self.stop_when.reason(self.state) if self.state.step < self.steps else None
        if stopped_by is not None:
            notice(f"stop_when: {stopped_by}: the run ends at step {self.state.step:,} of {self.steps:,}")
        self.emit(RunFinished(self.state.step, status, self.state.tokens, model, stopped_by))
        return self.state

    @watched("evaluation")
    def score_merge_curve(self) -> MergeCurve | None:
        """Score the points between the base model and the result of a complete run. ``None`` without a curve, or if a stop signal
        interrupted it; the run is then not complete."""
        if self.curve is None or not self.complete:
            return None
        self.watchdog.allow_slow()
        scored = self.curve.score(self.engine, self.state, **self.callbacks)
        self._pending_curve = scored is None
        if scored is not None:
            self.emit(scored)
        return scored

    @property
    def world(self) -> DistributedContext:
        """The ranks of this run and their collectives."""
        return self.engine.world

    @property
    def callbacks(self) -> dict[str, Callable[[], Any]]:
        """The callbacks that a long evaluation uses: whether to stop, and the watchdog's heartbeat."""
        return {"interrupted": self.interrupted, "alive": self.watchdog.heartbeat}

    @property
    def seconds(self) -> float:
        """The seconds that this run has taken, in all of its starts, by the clock of this rank."""
        return self._seconds_before + time.monotonic() - self._started_at

    @property
    def finished(self) -> bool:
        return self.state.step >= self.steps or self.stop_when.reason(self.state) is not None

    @property
    def complete(self) -> bool:
        """Whether only the export is left to do."""
        return self.finished and not self.state.pending_evaluation and not self._pending_curve

    @property
    def pauses(self) -> bool:
        """Whether the run evaluates, saves or ends at this step."""
        return self.evaluation_is_due() or self.checkpoints.pauses_at(self.state.step)

    def interrupted(self) -> bool:
        """Return whether any rank has received a stop signal. This is a collective."""
        return self.world.any_rank(self.interrupt.requested)[0]

    def emit(self, event: Event) -> None:
        self.watchdog.heartbeat()
        for listener in self.listeners:
            listener(event)
