"""Which model a finished run exports: its last one, its best checkpoint, or a point of the merge curve; and its averages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.checkpoint.train_state import TrainState
from pretrain.runtime.console import notice

if TYPE_CHECKING:
    from pretrain.telemetry.events import MergeCurve
    from pretrain.training.exporter import Exporter
    from pretrain.training.trainer import Trainer


def export_final(trainer: Trainer, exporter: Exporter, curve: MergeCurve | None) -> Path | None:
    """Export the model of the finished run of ``trainer``, or the chosen point of its merge ``curve``, and the averages that its
    hooks keep; return the model's folder, if one is written."""
    model = _export_model(trainer, exporter, curve)
    for name, weights in trainer.hooks.averages("export").items():
        exporter.average_at_end(name, weights, trainer.state)
    return model


def _export_model(trainer: Trainer, exporter: Exporter, curve: MergeCurve | None) -> Path | None:
    if exporter.when == "best":
        return exporter.at_end(_restore_best(trainer))
    if trainer.curve is None or curve is None or curve.chosen is None:
        return exporter.at_end(trainer.state)
    with trainer.curve.weights_at(trainer.engine, curve.chosen.alpha, curve.chosen.checkpoint):
        return exporter.at_end(trainer.state, note=trainer.curve.note(curve.chosen))


def _restore_best(trainer: Trainer) -> TrainState:
    """Load the weights of the best evaluated checkpoint; return its state, or the run's if there is none."""
    best = trainer.checkpoints.best()
    if best is None:
        notice("checkpoint.export=best: no checkpoint was evaluated at its own step; the last model is exported")
        return trainer.state
    saved, state = trainer.checkpoints.load(best, world=trainer.world), TrainState()
    trainer.engine.load_state_dict(saved["engine"])
    state.load_state_dict(saved["progress"])
    notice(f"checkpoint.export=best: the model of step {state.step:,} is exported")
    return state
