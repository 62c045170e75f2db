"""The loop where something is not as it was: bad steps, going back, a checkpoint of another run, other ranks."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint.store import load
from pretrain.distributed.context import DistributedContext
from pretrain.distributed.topology import Topology
from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import DataStatisticsEvent, Evaluated, RolledBack, Saved, StepDone
from pretrain.telemetry.interval import Interval
from pretrain.training import trainer as trainer_module
from pretrain.training.guard.config import GuardConfig as GuardPolicy
from tests.engines import ALONE, CPU
from tests.loops import IDENTITY, loop_in


@pytest.fixture
def loop(tmp_path):
    return loop_in(tmp_path)


def poison(trainer, first_sample):
    """The batch that begins there has no finite loss."""
    keep = trainer.engine.train_step

    def train_step(batch, **options):
        if batch.first_sample == first_sample:
            trainer.engine.backward, real = lambda b, **k: torch.tensor(math.nan), trainer.engine.backward
            try:
                return keep(batch, **options)
            finally:
                trainer.engine.backward = real
        return keep(batch, **options)

    trainer.engine.train_step = train_step


def test_a_bad_step_is_skipped_and_the_save_waits(loop, capsys):
    trainer, events, _ = loop()
    poison(trainer, 4)
    trainer.run()
    assert "step 2: loss nan" in capsys.readouterr().err
    assert [e.step for e in events if isinstance(e, Saved)] == [3, 4, 6], "what step 2 was to save, step 3 saves"
    done = [e for e in events if isinstance(e, StepDone)]
    assert [int(e.skipped) for e in done][-1] == 1
    assert math.isnan(float(done[1].loss))
    assert trainer.state.tokens == 192


def test_a_run_goes_back_to_the_last_checkpoint(loop, capsys):
    trainer, events, _ = loop(guard=GuardPolicy(nonfinite="rollback"))
    poison(trainer, 12)
    trainer.run()
    back = [e for e in events if isinstance(e, RolledBack)]
    assert [(e.step, e.bad_step, e.reason) for e in back] == [(2, 4, "nonfinite")]
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert f"rolled back to {trainer.checkpoints.writer.store.path(2)}" in capsys.readouterr().err
    assert trainer.guard.blocklist == {12}
    done = [e for e in events if isinstance(e, StepDone)]
    assert float(done[2].loss) == float(done[4].loss), "the step before it is the same again"
    assert math.isnan(float(done[5].loss)), "the batch is not trained"
    assert math.isnan(float(done[5].grad_norm))
    assert [int(e.skipped) for e in done[-3:]] == [1, 1, 1]
    assert (trainer.state.step, trainer.state.samples, trainer.state.tokens) == (6, 24, 192)
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 5, 6], "not of step 4, which was not trained"


def test_without_a_checkpoint_the_run_goes_on(loop, capsys):
    trainer, events, _ = loop(guard=GuardPolicy(nonfinite="rollback"), evaluate_every=Interval(1))
    poison(trainer, 0)
    trainer.run()
    assert (
        "there is no checkpoint to roll back to yet: the step is skipped and the run continues\n"
        in capsys.readouterr().err
    )
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events if isinstance(e, Evaluated)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_second_time_the_run_goes_further_back_unless_it_had_recovered(loop):
    """The batch of step 4 is bad: back at 3. So is that of step 5, before a step was trained: 3 was no better, back at 2.
    Step 3 is trained again, and saved; for the bad batch of step 6 that is good enough."""
    trainer, events, _ = loop(guard=GuardPolicy(nonfinite="rollback"), steps=7, save_every=Interval(1))
    for first_sample in (12, 16, 20):
        poison(trainer, first_sample)
    trainer.run()
    assert [(e.step, e.bad_step) for e in events if isinstance(e, RolledBack)] == [(3, 4), (2, 5), (3, 6)]
    assert [e.step for e in events if isinstance(e, Saved)] == [1, 2, 3, 3, 7]
    assert trainer.guard.blocklist == {12, 16, 20}


def test_a_run_goes_back_to_the_checkpoint_it_came_from(loop):
    """Before it has saved one of its own. The evaluation that was pending there has been made since."""
    cut, _, _ = loop(stop_at=(2,), evaluate_every=Interval(3))
    cut.run()
    origin = cut.checkpoints.writer.store.path(3)
    assert load(origin)["progress"]["pending_evaluation"] is True
    trainer, events, _ = loop(
        run="other", resume_from=origin, guard=GuardPolicy(nonfinite="rollback"), evaluate_every=Interval(None)
    )
    trainer.save, keep = lambda *, at_once: None, trainer.save  # its first save is still to come
    poison(trainer, 12)
    listener = trainer.listeners.append
    listener(lambda e: setattr(trainer, "save", keep) if isinstance(e, RolledBack) else None)
    trainer.run()
    assert [(e.step, e.bad_step) for e in events if isinstance(e, RolledBack)] == [(3, 4)]
    saved = [e for e in events if isinstance(e, Saved)]
    assert [e.step for e in saved] == [5, 6]
    assert load(saved[0].path)["progress"]["pending_evaluation"] is False


def changed(trainer, **identity):
    trainer.checkpoints.fingerprint = IDENTITY | identity
    return trainer


def test_another_length_is_the_same_place_in_the_text(loop):
    trainer, _, _ = loop(steps=2, guard=GuardPolicy(nonfinite="rollback"))
    trainer.guard.blocklist = {40}
    trainer.run()
    checkpoint = trainer.checkpoints.writer.store.path(2)
    for identity, samples, passed in (
        ({}, 8, {40}),
        ({"sequence_length": 16}, 4, set()),
        ({"sequence_length": 24}, 2, set()),  # of 2⅔ whole ones
        ({"global_batch": 8}, 8, set()),
        ({"data": "y"}, 8, set()),
        ({"seed": 1}, 8, set()),
    ):
        other = changed(loop()[0], **identity)
        other.restore(checkpoint)
        assert (other.state.samples, other.loader.state_dict()["samples"]) == (samples, samples)
        assert other.guard.blocklist == passed


@pytest.mark.parametrize("identity", [{"weights": "y"}, {"optimizer": ["other"]}], ids=str)
def test_another_optimizer_starts_anew(identity, loop, capsys):
    trainer, _, _ = loop(steps=2)
    trainer.run()
    other = changed(loop()[0], **identity)
    other.restore(trainer.checkpoints.writer.store.path(2))
    said = "the optimizer state starts empty: the saved moments belong to another optimizer or dtype of weights\n"
    assert said in capsys.readouterr().err
    assert not other.engine.optimizer.state
    same = loop()[0]
    same.restore(trainer.checkpoints.writer.store.path(2))
    assert same.engine.optimizer.state


def test_replicas_are_compared_before_a_save_unless_they_may_differ(loop, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer_module, "check_replicas", lambda engine, step: asked.append((engine, step)))
    trainer = loop()[0]
    trainer.run()
    assert asked == [(trainer.engine, step) for step in (2, 4, 6)]
    loop(guard=GuardPolicy(replicas="ignore"), run="other")[0].run()
    assert len(asked) == 3


def test_what_kept_another_rank_from_saving_ends_this_one(loop):
    trainer, _, _ = loop()
    asked = []
    trainer.engine.world = SimpleNamespace(
        any_rank=lambda *flags: asked.append(flags) or [False, True, False],
        sum=lambda value: asked.append(int(value)),
        device=CPU,
    )
    with pytest.raises(RuntimeError, match=r"^another rank could not write its part of a checkpoint$"):
        trainer.sync_stop_signal()
    assert asked == [(False, False, False), 0], "it waits for the other one, whose error says more"


def test_what_kept_this_rank_from_saving_is_said_to_the_others(loop):
    trainer, _, _ = loop()
    trainer.checkpoints.writer._error = UserError("the disk")
    asked = []
    trainer.engine.world = SimpleNamespace(any_rank=lambda *flags: asked.append(flags) or list(flags), device=CPU)
    with pytest.raises(UserError, match=r"^the disk$"):
        trainer.sync_stop_signal()
    assert asked == [(False, True, False)]


def test_before_a_failed_run_ends_it_says_what_became_of_its_saves(loop, capsys):
    trainer, events, _ = loop()
    trainer.checkpoints.writer._saved.append(Saved(2, trainer.checkpoints.writer.store.path(2), 1.0, 1.0, 7))
    trainer.checkpoints.writer._error = UserError("the disk")
    trainer.flush()
    assert capsys.readouterr().err.endswith("error: the disk\n")
    assert [e.step for e in events] == [2]


class Pair(DistributedContext):
    """Rank ``rank`` of two, of which the other one does the same."""

    def all_gather_object(self, work):
        return [work(), "the other one's"]

    def gather_object(self, work):
        return self.all_gather_object(work) if self.is_main else []

    def on_main_rank(self, work):
        return work()

    def sum(self, value):
        return 2 * value

    def all_reduce_sum(self, tensor):
        return tensor.mul_(2)

    def any_rank(self, *flags):
        return list(flags)


class OfAll(Pair):
    """The sum over both ranks of what is 0 for a complete checkpoint."""

    def sum(self, value):
        return 0


@pytest.mark.parametrize(("rank", "files"), [(0, {"card.md": b"step 1"}), (1, {})])
def test_what_a_rank_gives_to_a_checkpoint(rank, files, loop):
    """Its random state, to the first one, which writes all; and that one the files that are no rank's own."""
    trainer, _, _ = loop(steps=2, guard=GuardPolicy(replicas="ignore"))
    given = []
    trainer.engine.world = Pair(rank, Topology(workers_per_node=2))
    trainer.checkpoints.writer = SimpleNamespace(
        save=lambda step, state, *, at_once: given.append(state), collect=lambda: None, world=trainer.world
    )
    trainer.state.step = 1
    trainer.save(at_once=False)
    (state,) = given
    assert state["files"] == files
    if rank:
        assert state["rng"] == []
    else:
        assert (state["rng"][0].keys(), state["rng"][1]) == (trainer.rng.keys(), "the other one's")


def test_the_loss_and_the_tokens_are_those_of_all_ranks(loop):
    alone, _, _ = loop(steps=1, run="alone")
    trainer, _, _ = loop(steps=1)
    batch = alone.loader.batch(0)
    loss = alone.engine.train_step(replace(batch, num_targets=64)).loss
    trainer.engine.world = Pair(0, Topology(workers_per_node=2))
    done = trainer.train_step(batch)
    assert float(done.loss) == 2 * float(loss)
    assert (done.tokens, done.step_tokens) == (64, 64)


def test_only_the_first_rank_counts_the_data(loop):
    trainer, events, _ = loop()
    trainer.state.samples = 8
    trainer.engine.world = replace(ALONE, rank=1, topology=Topology(workers_per_node=2))
    trainer.emit_data()
    assert events == []
    trainer.engine.world = ALONE
    trainer.emit_data()
    assert [type(e) for e in events] == [DataStatisticsEvent]
    trainer.state.samples = 0
    trainer.emit_data()
    assert len(events) == 1, "before the first step there is nothing to tell"


def test_a_rank_that_the_checkpoint_did_not_have_keeps_its_random_state(loop):
    trainer, _, _ = loop(steps=2)
    trainer.run()
    other, _, _ = loop()
    own = other.rng
    other.engine.world = OfAll(1, Topology(workers_per_node=2))
    other.restore(trainer.checkpoints.writer.store.path(2))
    assert other.rng is own
    assert other.state.step == 2


def test_a_checkpoint_of_before_there_were_a_guard_and_records(loop):
    trainer, _, _ = loop(steps=2)
    save = trainer.checkpoints.writer.save
    trainer.checkpoints.writer.save = lambda step, state, *, at_once: save(
        step, {key: part for key, part in state.items() if key not in ("guard", "records")}, at_once=at_once
    )
    trainer.run()
    path = trainer.checkpoints.writer.store.path(2)
    assert not {"guard", "records"} & load(path).keys()
    other, events, _ = loop(resume_from=path, steps=2)
    other.run()
    assert (events[0].step, events[0].records) == (2, ())
    assert other.guard.blocklist == set()
