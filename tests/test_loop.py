"""The loop by itself: a real engine, loader, guard and store; what scores and exports only writes down when it is asked."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain import trainer as trainer_module
from pretrain.checkpoint.rng import seed_everything
from pretrain.checkpoint.store import load
from pretrain.events import (
    DataSeen,
    Evaluated,
    RolledBack,
    Sampled,
    Saved,
    StepDone,
    StoodStill,
)
from pretrain.guard.policy import Policy as GuardPolicy
from pretrain.interval import Every
from tests.engines import ALONE, CPU, engine_of
from tests.loops import IDENTITY, RECORD, loop_in


@pytest.fixture
def loop(tmp_path):
    return loop_in(tmp_path)


def names(events) -> list:
    return [(type(e).__name__, e.step) for e in events if not isinstance(e, DataSeen | Sampled)]


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
        ("StoodStill", 2),
        ("Saved", 2),
        ("StepDone", 3),
        ("Evaluated", 3),
        ("StepDone", 4),
        ("StoodStill", 4),
        ("Saved", 4),
        ("StepDone", 5),
        ("StepDone", 6),
        ("Evaluated", 6),
        ("StoodStill", 6),
        ("Saved", 6),
        ("RunFinished", 6),
    ]
    started, finished = events[0], events[-1]
    assert (started.total_steps, started.resumed, started.owes_evaluation) == (6, False, False)
    assert (started.records, started.facts) == ((), {"fact": 1})
    assert (finished.status, finished.tokens, finished.model) == ("finished", 6 * 32, Path("model"))
    assert [e.for_ for e in events if isinstance(e, StoodStill)] == ["checkpoint"] * 3
    assert [e.step for e in events if isinstance(e, Sampled)] == [0, 3, 6]
    assert [e.step for e in events if isinstance(e, DataSeen)] == [3, 6]
    assert all(0 <= e.seconds < 60 for e in events if isinstance(e, Evaluated | DataSeen | StoodStill))
    assert [call[1:] for call in scores.calls] == [(True, False), (False, False), (False, False)]
    assert [call[0] is None for call in scores.calls] == [True, False, False], "the first is the baseline"
    assert trainer.exporter.when == [("save", 2), ("save", 4), ("end", 6)]
    assert (progress.step, progress.samples, progress.tokens) == (6, 24, 192)
    assert (progress.baseline, progress.losses, progress.evaluated_at) == ({"d": 2.5}, {"d": 4.5}, 6)
    assert [(s["domain"], s["loss"]) for s in progress.scores] == [("d", 4.5)]
    assert progress.owes_evaluation is False


def test_a_step_is_told_with_its_numbers(loop):
    trainer, events, _ = loop(total_steps=2)
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
    assert (first.epoch, second.epoch) == pytest.approx((4 / trainer.loader.num_blocks, 8 / trainer.loader.num_blocks))


def test_micro_batches_and_the_last_of_them(loop):
    trainer, _, _ = loop(total_steps=1)
    seen, keep = [], trainer.engine.backward
    trainer.engine.backward = lambda b, **k: seen.append((len(b.labels), k)) or keep(b, **k)
    trainer.run()
    assert seen == [(2, {"tokens": 32, "last": False}), (2, {"tokens": 32, "last": True})]


def test_it_resumes_to_the_last_bit(loop):
    whole, events, _ = loop()
    whole.run()
    again, later, scores = loop(resume_from=whole.saver.store.path(2))
    again.engine.step_module.train()
    again.run()
    assert later[0].resumed is True
    assert later[0].step == 2
    assert later[0].records == (RECORD,)
    assert steps_of(later) == {step: told for step, told in steps_of(events).items() if step > 2}
    assert all(torch.equal(t, weights(whole)[name]) for name, t in weights(again).items())
    assert [call[1] for call in scores.calls] == [True, False]
    assert again.progress.baseline == {"d": 2.5}
    foreign, told, _ = loop(resume_from=whole.saver.store.path(2), run="other")
    foreign.run()
    assert told[0].records == (), "another run's records are told by its own files"
    assert [e.step for e in told if isinstance(e, Saved)] == [4, 6]


def test_what_a_checkpoint_holds(loop):
    trainer, _, _ = loop(total_steps=3)
    trainer.run()
    path = trainer.saver.store.path(2)
    state = load(path)
    assert state["loader"] == {"samples": 8}
    assert (state["progress"]["step"], state["progress"]["samples"], state["progress"]["tokens"]) == (2, 8, 64)
    assert state["guard"] == {"losses": [], "skips_in_a_row": 0, "passed_over": []}
    assert (state["identity"], state["records"], len(state["rng"])) == (IDENTITY, [RECORD], 1)
    assert (path / "card.md").read_text() == "step 2"


def test_the_random_state_is_the_runs_own(loop):
    drawn = []
    trainer, _, _ = loop(total_steps=2, listeners=[lambda event: torch.randn(7)])
    keep = trainer.engine.backward
    trainer.engine.backward = lambda b, **k: drawn.append(float(torch.rand(()))) or keep(b, **k)
    seed_everything(99)
    trainer.run()
    seed_everything(0)
    assert drawn[0] != float(torch.rand(())), "the listener of an evaluation has drawn too"
    restored, _, _ = loop(total_steps=4, resume_from=trainer.saver.store.path(2))
    restored.restore(restored.resume_from)
    assert restored.rng == load(restored.resume_from)["rng"][0]


def test_a_stop_signal_saves_and_leaves(loop):
    interrupt = SimpleNamespace(requested=False)
    trainer, events, _ = loop(interrupt=interrupt, save_every=Every(None), evaluate_every=Every(None))
    trainer.listeners.append(lambda e: setattr(interrupt, "requested", e.step == 3 and isinstance(e, StepDone)))
    trainer.listeners.append(lambda e: None)
    keep = trainer.agree
    trainer.agree = keep
    trainer.run()
    assert names(events)[-4:] == [("StepDone", 3), ("StoodStill", 3), ("Saved", 3), ("RunFinished", 3)]
    assert (events[-1].status, events[-1].model) == ("stopped", None)
    assert trainer.exporter.when == [("save", 3)]
    assert trainer.saver.store.steps() == [3]
    interrupt.requested = False
    again, later, _ = loop(resume_from=trainer.saver.store.path(3), save_every=Every(None), evaluate_every=Every(None))
    again.run()
    whole, events, _ = loop(save_every=Every(None), evaluate_every=Every(None), run="whole")
    whole.run()
    assert steps_of(later) == {s: told for s, told in steps_of(events).items() if s > 3}


def test_a_signal_before_the_first_step_trains_nothing(loop):
    trainer, events, _ = loop(interrupt=SimpleNamespace(requested=True))
    trainer.run()
    assert [n for n, _ in names(events)] == ["RunStarted", "Evaluated", "RunFinished"]
    assert trainer.saver.store.steps() == []


def test_an_evaluation_that_is_cut_short_is_owed(loop):
    trainer, events, _ = loop(stop_at=(2,))
    trainer.run()
    assert names(events)[-5:] == [
        ("StepDone", 3),
        ("StoodStill", 3),
        ("StoodStill", 3),
        ("Saved", 3),
        ("RunFinished", 3),
    ]
    assert [e.for_ for e in events if isinstance(e, StoodStill)][-2:] == ["evaluation", "checkpoint"]
    assert events[-1].status == "stopped"
    assert load(trainer.saver.store.path(3))["progress"]["owes_evaluation"] is True
    again, later, _ = loop(resume_from=trainer.saver.store.path(3))
    again.run()
    assert later[0].owes_evaluation is True
    assert names(later)[:5] == [("RunStarted", 3), ("Evaluated", 3), ("StoodStill", 3), ("Saved", 3), ("StepDone", 4)]
    assert again.progress.owes_evaluation is False


def poison(trainer, first_sample):
    """The batch that begins there has no finite loss."""
    keep = trainer.update

    def update(batch, tokens):
        if batch.first_sample == first_sample:
            trainer.engine.backward, real = lambda b, **k: torch.tensor(math.nan), trainer.engine.backward
            try:
                return keep(batch, tokens)
            finally:
                trainer.engine.backward = real
        return keep(batch, tokens)

    trainer.update = update


def test_a_bad_step_is_skipped_and_the_save_waits(loop, capsys):
    trainer, events, _ = loop()
    poison(trainer, 4)
    trainer.run()
    assert "step 2: loss nan" in capsys.readouterr().err
    assert [e.step for e in events if isinstance(e, Saved)] == [3, 4, 6], "what step 2 was to save, step 3 saves"
    done = [e for e in events if isinstance(e, StepDone)]
    assert [int(e.skipped) for e in done][-1] == 1
    assert math.isnan(float(done[1].loss))
    assert trainer.progress.tokens == 192


def test_a_run_goes_back_to_the_last_checkpoint(loop, capsys):
    trainer, events, _ = loop(guard=GuardPolicy(nonfinite="rollback"))
    poison(trainer, 12)
    trainer.run()
    back = [e for e in events if isinstance(e, RolledBack)]
    assert [(e.step, e.bad_step, e.reason) for e in back] == [(2, 4, "nonfinite")]
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert f"back at {trainer.saver.store.path(2)}" in capsys.readouterr().err
    assert trainer.guard.passed_over == {12}
    done = [e for e in events if isinstance(e, StepDone)]
    assert float(done[2].loss) == float(done[4].loss), "the step before it is the same again"
    assert math.isnan(float(done[5].loss)), "the batch is not trained"
    assert math.isnan(float(done[5].grad_norm))
    assert [int(e.skipped) for e in done[-3:]] == [1, 1, 1]
    assert (trainer.progress.step, trainer.progress.samples, trainer.progress.tokens) == (6, 24, 192)
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 5, 6], "not of step 4, which was not trained"


def test_without_a_checkpoint_the_run_goes_on(loop, capsys):
    trainer, events, _ = loop(guard=GuardPolicy(nonfinite="rollback"))
    poison(trainer, 0)
    trainer.run()
    assert "there is no checkpoint to go back to yet: the run goes on\n" in capsys.readouterr().err
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2, 3, 4, 5, 6]


def changed(trainer, **identity):
    trainer.identity = IDENTITY | identity
    return trainer


def test_another_length_is_the_same_place_in_the_text(loop):
    trainer, _, _ = loop(total_steps=2, guard=GuardPolicy(nonfinite="rollback"))
    trainer.guard.passed_over = {40}
    trainer.run()
    checkpoint = trainer.saver.store.path(2)
    for identity, samples, passed in (
        ({}, 8, {40}),
        ({"sequence_length": 16}, 4, set()),
        ({"global_batch": 8}, 8, set()),
        ({"data": "y"}, 8, set()),
        ({"seed": 1}, 8, set()),
    ):
        other = changed(loop()[0], **identity)
        other.restore(checkpoint)
        assert (other.progress.samples, other.loader.state_dict()) == (samples, {"samples": samples})
        assert other.guard.passed_over == passed


@pytest.mark.parametrize("identity", [{"weights": "y"}, {"optimizer": ["other"]}], ids=str)
def test_another_optimizer_starts_anew(identity, loop, capsys):
    trainer, _, _ = loop(total_steps=2)
    trainer.run()
    other = changed(loop()[0], **identity)
    other.restore(trainer.saver.store.path(2))
    said = "the optimizer starts anew: its moments are of another optimizer or type of weights\n"
    assert said in capsys.readouterr().err
    assert not other.engine.optimizer.state
    same = loop()[0]
    same.restore(trainer.saver.store.path(2))
    assert same.engine.optimizer.state


def test_replicas_are_compared_before_a_save_unless_they_may_differ(loop, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer_module, "check_replicas", lambda engine, step: asked.append(step))
    loop()[0].run()
    assert asked == [2, 4, 6]
    loop(guard=GuardPolicy(replicas="ignore"), run="other")[0].run()
    assert asked == [2, 4, 6]


def test_what_kept_another_rank_from_saving_ends_this_one(loop):
    trainer, _, _ = loop()
    trainer.world = SimpleNamespace(any=lambda *flags: [False, True], sum=lambda value: value, device=CPU)
    with pytest.raises(RuntimeError, match=r"^another rank could not write its part of a checkpoint$"):
        trainer.agree()


def test_only_the_first_rank_counts_the_data(loop):
    trainer, events, _ = loop()
    trainer.progress.samples = 8
    trainer.world = replace(ALONE, rank=1, size=2)
    trainer.tell_data()
    assert events == []
    trainer.world = ALONE
    trainer.tell_data()
    assert [type(e) for e in events] == [DataSeen]
    trainer.progress.samples = 0
    trainer.tell_data()
    assert len(events) == 1, "before the first step there is nothing to tell"
