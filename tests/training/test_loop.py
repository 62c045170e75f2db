"""The loop of a run that nothing goes wrong in, or that a signal ends: what it does when, its numbers, its checkpoints."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint.rng import seed_everything
from pretrain.checkpoint.store import load
from pretrain.strategy import engine as engine_module
from pretrain.telemetry.events import DataStatisticsEvent, Evaluated, Sampled, Saved, StepDone, TrainingPaused
from pretrain.telemetry.interval import Interval
from pretrain.training.layer_statistics import LayerStatistics
from tests.engines import engine_of
from tests.loops import IDENTITY, RECORD, loop_in


@pytest.fixture
def loop(tmp_path):
    return loop_in(tmp_path)


def names(events) -> list:
    return [(type(e).__name__, e.step) for e in events if not isinstance(e, DataStatisticsEvent | Sampled)]


def steps_of(events) -> dict[int, tuple]:
    return {e.step: (float(e.loss), float(e.grad_norm), e.lr, e.tokens) for e in events if isinstance(e, StepDone)}


def weights(trainer) -> dict:
    return {name: p.detach().clone() for name, p in trainer.engine.model.hf_named_parameters()}


def test_what_happens_when(loop):
    trainer, events, scores = loop()
    progress = trainer.run()
    assert names(events) == [
        ("RunStarted", 0),
        ("Evaluated", 0),
        ("StepDone", 1),
        ("StepDone", 2),
        ("TrainingPaused", 2),
        ("Saved", 2),
        ("StepDone", 3),
        ("Evaluated", 3),
        ("StepDone", 4),
        ("TrainingPaused", 4),
        ("Saved", 4),
        ("StepDone", 5),
        ("StepDone", 6),
        ("Evaluated", 6),
        ("TrainingPaused", 6),
        ("Saved", 6),
        ("RunFinished", 6),
    ]
    started, finished = events[0], events[-1]
    assert (started.total_steps, started.resumed, started.pending_evaluation) == (6, False, False)
    assert (started.records, started.facts) == ((), {"fact": 1})
    assert (finished.status, finished.tokens, finished.model) == ("finished", 6 * 32, Path("model"))
    assert [e.for_ for e in events if isinstance(e, TrainingPaused)] == ["checkpoint"] * 3
    assert [e.step for e in events if isinstance(e, Sampled)] == [0, 3, 6]
    seen = [(e.step, e.sources) for e in events if isinstance(e, DataStatisticsEvent)]
    assert seen == [(3, trainer.statistics.sources(12)), (6, trainer.statistics.sources(24))]
    assert sum(source.tokens for source in seen[1][1].values()) == 24 * 8
    assert all(0 <= e.seconds < 60 for e in events if isinstance(e, Evaluated | DataStatisticsEvent | TrainingPaused))
    assert [call[1:] for call in scores.calls] == [(True, False), (False, False), (False, False)]
    assert [call[0] is None for call in scores.calls] == [True, False, False], "the first is the baseline"
    assert [e.path for e in events if isinstance(e, Saved)] == [
        trainer.checkpoints.writer.store.path(s) for s in (2, 4, 6)
    ]
    assert trainer.exporter.when == [("save", 2), ("save", 4), ("end", 6)]
    assert (progress.step, progress.samples, progress.tokens) == (6, 24, 192)
    assert (progress.baseline, progress.evaluated_at) == ({"d": 2.5}, 6)
    assert [(s["domain"], s["loss"]) for s in progress.scores] == [("d", 4.5)]
    assert progress.pending_evaluation is False


def test_a_step_is_told_with_its_numbers(loop):
    trainer, events, _ = loop(steps=2)
    expected = torch.zeros(())
    batch = trainer.loader.batch(0)
    other = engine_of()
    for micro in batch.split(2):
        expected += other.backward(micro, tokens=32, last=True)
    norm = other.clip(None)
    trainer.run()
    first, second = (e for e in events if isinstance(e, StepDone))
    assert float(first.loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(first.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    assert (first.lr, second.lr) == pytest.approx((1e-2, 5e-3))
    assert (first.tokens, first.step_tokens, second.tokens, second.step_tokens) == (32, 32, 64, 32)
    assert first.step_samples == 4
    assert (int(first.skipped), first.loss_scale, first.layers) == (0, None, None)
    assert (first.epoch, second.epoch) == pytest.approx(
        (4 / len(trainer.loader.blocks[0]), 8 / len(trainer.loader.blocks[0]))
    )


def test_the_update_is_the_engines_own(loop):
    """Clipped, with the learning rate of its step, from the gradients of all micro-batches."""
    trainer, _, _ = loop(steps=2)
    by_hand = engine_of()
    for step, batch in enumerate(map(trainer.loader.batch, (0, 4))):
        by_hand.set_lr(lambda step: 1.0 / (step + 1), step)
        for micro, last in zip(batch.split(2), (False, True), strict=True):
            by_hand.backward(micro, tokens=32, last=last)
        assert by_hand.step(0.5) > 0.5
    trainer.run()
    expected = {name: p.detach() for name, p in by_hand.model.hf_named_parameters()}
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(trainer).items())


def test_the_layers_of_every_second_step(loop):
    trainer, events, _ = loop()
    trainer.layers = LayerStatistics(trainer.engine, Interval(2))
    trainer.run()
    found = {e.step: e.layers for e in events if isinstance(e, StepDone)}
    assert [step for step, layers in found.items() if layers is not None] == [2, 4, 6]


def test_a_steps_time_by_its_parts(loop):
    """Agreeing on a stop signal comes after a step has been logged, so it counts with the next one."""
    trainer, events, _ = loop(steps=2)
    trainer.run()
    first, second = ([part for part, _, _ in e.times.spans] for e in events if isinstance(e, StepDone))
    assert first == ["data", "communication", "compute", "communication", "optimizer"]
    assert second == ["communication", *first]


@pytest.mark.parametrize(("compiled", "times"), [(True, 2), (False, 0)])
def test_signals_are_held_while_a_compiler_may_run(compiled, times, loop, monkeypatch):
    held = []

    @contextmanager
    def hold():
        held.append(trainer.state.step)
        yield

    monkeypatch.setattr(engine_module, "signals_blocked", hold)
    trainer, _, _ = loop(steps=2)
    trainer.engine.model.is_compiled = compiled
    trainer.run()
    assert held == [0, 1][:times]


def test_micro_batches_and_the_last_of_them(loop):
    trainer, _, _ = loop(steps=1)
    seen, keep = [], trainer.engine.backward
    trainer.engine.backward = lambda b, **k: seen.append((len(b.labels), k)) or keep(b, **k)
    trainer.run()
    assert seen == [(2, {"tokens": 32, "last": False}), (2, {"tokens": 32, "last": True})]


def at_once_of(trainer) -> list:
    """(step, whether it was written before training continued) of every save that is going to be."""
    asked, keep = [], trainer.checkpoints.writer.save

    def save(step, state, *, at_once):
        asked.append((step, at_once))
        return keep(step, state, at_once=at_once)

    trainer.checkpoints.writer.save = save
    return asked


def test_training_waits_for_the_last_save_alone(loop):
    """Also where the last step is no multiple of save_every."""
    trainer, events, _ = loop(steps=5)
    asked = at_once_of(trainer)
    trainer.run()
    assert asked == [(2, False), (4, False), (5, True)]
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 4, 5]


def test_verdicts_are_read_late_but_before_what_depends_on_them(loop):
    """On a GPU reading waits for the device: only where the run evaluates (3), saves (2, 4), or ends (5)."""
    trainer, _, _ = loop(steps=5)
    asked, keep = [], trainer.guard.handle_bad_steps
    trainer.guard.handle_bad_steps = lambda *, at_once: asked.append(at_once) or keep(at_once=at_once)
    trainer.run()
    assert asked == [False, True, True, True, True]


def test_it_resumes_to_the_last_bit(loop):
    whole, events, _ = loop()
    whole.run()
    again, later, scores = loop(resume_from=whole.checkpoints.writer.store.path(2))
    again.engine.step_module.train()
    again.run()
    assert later[0].resumed is True
    assert later[0].step == 2
    assert later[0].records == (RECORD,)
    assert steps_of(later) == {step: told for step, told in steps_of(events).items() if step > 2}
    assert all(torch.equal(t, weights(whole)[name]) for name, t in weights(again).items())
    assert [call[1] for call in scores.calls] == [True, False]
    assert again.state.baseline == {"d": 2.5}
    foreign, told, _ = loop(resume_from=whole.checkpoints.writer.store.path(2), run="other")
    foreign.run()
    assert told[0].records == (), "another run's records are told by its own files"
    assert [e.step for e in told if isinstance(e, Saved)] == [4, 6]


def test_what_a_checkpoint_holds(loop):
    trainer, _, _ = loop(steps=3)
    trainer.run()
    path = trainer.checkpoints.writer.store.path(2)
    state = load(path)
    assert state["loader"] == {"samples": 8, "parts": {"x": 8}}
    assert (state["progress"]["step"], state["progress"]["samples"], state["progress"]["tokens"]) == (2, 8, 64)
    assert state["guard"] == {"losses": [], "skips_in_a_row": 0, "passed_over": []}
    assert (state["identity"], state["records"], len(state["rng"])) == (IDENTITY, [RECORD], 1)
    assert (path / "card.md").read_text() == "step 2"


def test_the_random_state_is_the_runs_own(loop):
    drawn = []
    trainer, _, _ = loop(steps=2, listeners=[lambda event: torch.randn(7)])
    keep = trainer.engine.backward
    trainer.engine.backward = lambda b, **k: drawn.append(float(torch.rand(()))) or keep(b, **k)
    seed_everything(99)
    trainer.run()
    seed_everything(0)
    assert drawn[0] != float(torch.rand(())), "the listener of an evaluation has drawn too"
    restored, _, _ = loop(steps=4, resume_from=trainer.checkpoints.writer.store.path(2))
    restored.restore(restored.checkpoints.resume_from)
    assert restored.rng == load(restored.checkpoints.resume_from)["rng"][0]


def test_a_stop_signal_saves_and_leaves(loop):
    interrupt = SimpleNamespace(requested=False)
    trainer, events, _ = loop(interrupt=interrupt, save_every=Interval(None), evaluate_every=Interval(None))
    trainer.listeners.append(lambda e: setattr(interrupt, "requested", e.step == 3 and isinstance(e, StepDone)))
    asked = at_once_of(trainer)
    trainer.run()
    assert asked == [(3, True)]
    assert [e.step for e in events if isinstance(e, DataStatisticsEvent)] == [3], "no evaluation has said it"
    assert names(events)[-4:] == [("StepDone", 3), ("TrainingPaused", 3), ("Saved", 3), ("RunFinished", 3)]
    assert (events[-1].status, events[-1].model) == ("stopped", None)
    assert trainer.exporter.when == [("save", 3)]
    assert trainer.checkpoints.writer.store.steps() == [3]
    interrupt.requested = False
    again, later, _ = loop(
        resume_from=trainer.checkpoints.writer.store.path(3), save_every=Interval(None), evaluate_every=Interval(None)
    )
    again.run()
    whole, events, _ = loop(save_every=Interval(None), evaluate_every=Interval(None), run="whole")
    whole.run()
    assert steps_of(later) == {s: told for s, told in steps_of(events).items() if s > 3}


def test_a_signal_before_the_first_step_trains_nothing(loop):
    trainer, events, _ = loop(interrupt=SimpleNamespace(requested=True))
    trainer.run()
    assert [n for n, _ in names(events)] == ["RunStarted", "Evaluated", "RunFinished"]
    assert trainer.checkpoints.writer.store.steps() == []


def test_an_evaluation_that_is_cut_short_is_owed(loop):
    trainer, events, _ = loop(stop_at=(2,))
    trainer.run()
    assert names(events)[-5:] == [
        ("StepDone", 3),
        ("TrainingPaused", 3),
        ("TrainingPaused", 3),
        ("Saved", 3),
        ("RunFinished", 3),
    ]
    assert [e.for_ for e in events if isinstance(e, TrainingPaused)][-2:] == ["evaluation", "checkpoint"]
    assert events[-1].status == "stopped"
    assert load(trainer.checkpoints.writer.store.path(3))["progress"]["pending_evaluation"] is True
    again, later, _ = loop(resume_from=trainer.checkpoints.writer.store.path(3))
    again.run()
    assert later[0].pending_evaluation is True
    assert names(later)[:5] == [
        ("RunStarted", 3),
        ("Evaluated", 3),
        ("TrainingPaused", 3),
        ("Saved", 3),
        ("StepDone", 4),
    ]
    assert again.state.pending_evaluation is False


@pytest.mark.parametrize("last", [3, 6])
def test_a_pending_evaluation_is_made_and_saved(last, loop):
    """At once where it was the run's last step, as the run ends then."""
    cut, _, _ = loop(stop_at=(2,), steps=last)
    cut.run()
    again, _, _ = loop(resume_from=cut.checkpoints.writer.store.path(3), steps=last)
    asked = at_once_of(again)
    again.run()
    assert asked[0] == (3, last == 3)
    assert load(again.checkpoints.writer.store.path(3))["progress"]["evaluated_at"] == 3


def test_a_pending_evaluation_that_is_cut_short_again_stays_pending(loop):
    cut, _, _ = loop(stop_at=(2,))
    cut.run()
    interrupt = SimpleNamespace(requested=True)
    again, events, _ = loop(resume_from=cut.checkpoints.writer.store.path(3), stop_at=(1,), interrupt=interrupt)
    again.run()
    assert names(events) == [("RunStarted", 3), ("TrainingPaused", 3), ("RunFinished", 3)], "nothing to save"
    assert load(cut.checkpoints.writer.store.path(3))["progress"]["pending_evaluation"] is True
