"""State beside the model: updated after every step, saved with every checkpoint, restored on a resume and on a rollback."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import RolledBack
from pretrain.training.checkpoints import Checkpoints
from pretrain.training.guard.config import GuardConfig
from pretrain.training.hook import Hook
from tests.loops import loop_in
from tests.training.test_loop_faults import poison


class Average(Hook):
    """A moving average of the weights, and the steps that it has seen."""

    def setup(self, engine):
        self.weights = {name: p.detach().clone() for name, p in engine.model.hf_named_parameters()}
        self.seen = []

    def after_step(self, state, engine):
        self.seen.append(state.step)
        for name, p in engine.model.hf_named_parameters():
            self.weights[name].lerp_(p.detach(), 0.5)

    def state_dict(self):
        return self.weights | {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state.pop("seen")
        self.weights = state


@pytest.fixture
def loop(tmp_path):
    return loop_in(tmp_path)


def equal(one, other) -> bool:
    return all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


def test_the_state_is_resumed_to_the_last_bit(loop):
    whole, resumed = Average(), Average()
    trainer, _, _ = loop(hooks={"ema": whole})
    trainer.run()
    path = trainer.checkpoints.writer.store.path(2)
    assert (path / "hook.safetensors").exists()
    loop(hooks={"ema": resumed}, resume_from=path)[0].run()
    assert resumed.seen == whole.seen == [1, 2, 3, 4, 5, 6]
    assert equal(whole, resumed)
    assert not equal(whole, trained(loop, Average(), steps=2)), "the average must have moved since step 2"


def trained(loop, hook, **options):
    loop(hooks={"ema": hook}, run="other", **options)[0].run()
    return hook


def test_a_rollback_takes_the_state_back(loop):
    hook = Average()
    trainer, events, _ = loop(hooks={"ema": hook}, guard=GuardConfig(nonfinite="rollback"))
    poison(trainer, 12)
    trainer.run()
    assert [e.step for e in events if isinstance(e, RolledBack)] == [2]
    assert hook.seen == [1, 2, 3, 4, 5, 6]


def test_a_hook_that_was_not_there_before_or_is_there_no_more(loop, capsys):
    trainer, _, _ = loop(hooks={"old": Average()}, steps=2)
    trainer.run()
    new = Average()
    loop(hooks={"new": new}, resume_from=trainer.checkpoints.writer.store.path(2), steps=4)[0].run()
    said = capsys.readouterr().err
    assert "hook new: the checkpoint has no state of it" in said
    assert "hook old: its state in the checkpoint is not used" in said
    assert new.seen == [3, 4]


def test_a_hook_that_is_new_starts_from_the_weights_of_the_checkpoint(loop):
    trainer, _, _ = loop(steps=2)
    trainer.run()
    new = Average()
    resumed, _, _ = loop(hooks={"new": new}, resume_from=trainer.checkpoints.writer.store.path(2), steps=2)
    resumed.run()
    saved = {name: p.detach() for name, p in trainer.engine.model.hf_named_parameters()}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in new.weights.items())


def test_what_is_saved_does_not_change_later(loop):
    """The state is written while training continues."""
    hook = Average()
    trainer, _, _ = loop(hooks={"ema": hook})
    trainer.start()
    hook.seen.append(1)
    saved = trainer.hooks.added_to(trainer.engine.state_dict())
    hook.seen.append(2)
    assert saved["hooks"] == {"ema": {"seen": [1]}}


def test_one_save_asks_for_the_state_once(loop):
    """It may be a collective that gathers every weight, so no other collective runs around it."""
    called, inside = [], []

    class Counting(Average):
        def state_dict(self):
            called.append(1)
            return super().state_dict()

    trainer, _, _ = loop(hooks={"ema": Counting()})
    trainer.start()

    def gathered(work):
        before = len(called)
        found = [work()]
        inside.append(len(called) - before)
        return found

    trainer.hooks._world = SimpleNamespace(rank=0, size=1, is_main=True, all_gather_object=gathered)
    called.clear()
    trainer.hooks.added_to(trainer.engine.state_dict())
    assert (len(called), inside) == (1, [0])


def test_plain_values_that_can_not_be_saved(loop):
    hook = Average()
    trainer, _, _ = loop(hooks={"ema": hook})
    trainer.start()
    engine_state = trainer.engine.state_dict()
    hook.seen = {1, 2}
    with pytest.raises(UserError, match=r"hook ema: its state can't be saved in a checkpoint: .*set is not JSON"):
        trainer.hooks.added_to(engine_state)
    hook.seen = [1]
    theirs = {"ema": '{"seen": [2]}'}
    trainer.hooks._world = SimpleNamespace(
        rank=0, size=1, is_main=True, all_gather_object=lambda work: [work(), theirs]
    )
    with pytest.raises(UserError, match="hook ema: the plain values of its state differ between ranks"):
        trainer.hooks.added_to(engine_state)


def test_checkpoints_without_a_fingerprint_are_not_begun(loop):
    trainer, _, _ = loop()
    with pytest.raises(ValueError, match="'seed', 'sequence_length'"):
        Checkpoints(trainer.checkpoints.writer)


def test_a_state_of_another_shape_is_refused(loop):
    class Wider(Average):
        def setup(self, engine):
            super().setup(engine)
            self.weights = {name: torch.cat([t, t]) for name, t in self.weights.items()}

    trainer, _, _ = loop(hooks={"ema": Average()}, steps=2)
    trainer.run()
    with pytest.raises(UserError, match="ema/"):
        loop(hooks={"ema": Wider()}, resume_from=trainer.checkpoints.writer.store.path(2))[0].run()


def test_a_state_that_can_not_be_saved_ends_the_run_before_it_trains(loop):
    class Nested(Average):
        def state_dict(self):
            return {"weights": self.weights}

    trainer, events, _ = loop(hooks={"ema": Nested()})
    with pytest.raises(UserError, match="a state is flat: tensors and plain JSON values"):
        trainer.run()
    assert events == []
