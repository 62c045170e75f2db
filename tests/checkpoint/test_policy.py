"""Which checkpoints stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.store import CheckpointStore, load, losses_of
from pretrain.checkpoint.train_state import TrainState
from pretrain.runtime.errors import UserError
from pretrain.telemetry.sinks.jsonl import read_records
from tests.checkpoint.test_store import saved_at, state

SCORE = {"domain": "new", "role": "new", "perplexity": 1.0, "bits_per_byte": None}
COUNT = st.none() | st.integers(1, 4)
LOSSES = st.dictionaries(
    st.integers(1, 60), st.just({}) | st.floats(0, 9).map(lambda loss: {"new": loss, "old": -loss})
)


@given(LOSSES, COUNT, COUNT, COUNT)
def test_what_stays(losses, last, every, best):
    policy = CheckpointConfig(keep_last=last, keep_every=every, keep_best=best)
    kept = policy.kept(losses)
    assert kept <= set(losses)
    if last is None:
        assert kept == set(losses)
        return
    newest = set(sorted(losses)[-last:])
    assert newest <= kept
    rest = kept - newest - {step for step in losses if every and step % every == 0}
    assert all(losses[step] for step in rest), "one that was not evaluated can't be among the best"
    assert len(rest) <= (best or 0)
    evaluated = {step: loss["new"] for step, loss in losses.items() if loss}
    if best and evaluated:
        assert min(evaluated.values()) in {evaluated[step] for step in kept if step in evaluated}
    assert policy.kept({step: losses[step] for step in kept}) == kept, "asked again, all of them stay"


def test_best_by_another_domain():
    losses = {step: {"new": float(step), "old": float(-step)} for step in range(1, 6)}
    assert CheckpointConfig(keep_last=1, keep_best=1).kept(losses) == {1, 5}
    assert CheckpointConfig(keep_last=1, keep_best=2, best_by="old").kept(losses) == {4, 5}


def test_a_loss_that_is_no_number_is_not_the_best():
    losses = {5: {"a": 2.0}, 10: {"a": float("nan")}, 15: {"a": 1.0}, 20: {"a": 3.0}}
    assert CheckpointConfig(keep_last=1, keep_best=1).kept(losses) == {15, 20}


def test_losses_of_other_text_are_not_ranked_with_each_other():
    """Steps 1 to 3 were scored on one text, 4 and 5 on another; of a checkpoint of an earlier version it is not known."""
    losses = {step: {"new": loss} for step, loss in ((1, 1.5), (2, 1.0), (3, 2.0), (4, 9.0), (5, 8.0), (6, 9.5))}
    digests = {step: {"new": "one" if step < 4 else "other"} for step in losses}
    assert CheckpointConfig(keep_last=1, keep_best=1).kept(losses, digests) == {2, 5, 6}
    assert CheckpointConfig(keep_last=1, keep_best=1).kept(losses, digests | {1: {}}) == {1, 2, 5, 6}
    assert CheckpointConfig(keep_last=1, keep_best=1).kept(losses) == {2, 6}


def test_a_checkpoint_is_not_ranked_by_an_older_evaluation(tmp_path):
    """That of step 3 carries the scores of step 2, the best there are, and was not evaluated itself."""
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=2, keep_best=1))
    one = {"new": "one"}
    expected = {
        1: ({"new": 5.0}, one),
        2: ({"new": 1.0}, one),
        3: ({}, {}),
        4: ({"new": 3.0}, one),
        5: ({"new": 4.0}, one),
    }
    for step, evaluated_at, loss in ((1, 1, 5.0), (2, 2, 1.0), (3, 2, 1.0), (4, 4, 3.0), (5, 5, 4.0)):
        saved = state(step)
        saved["progress"] |= {"evaluated_at": evaluated_at, "scores": [SCORE | {"loss": loss, "digest": "one"}]}
        assert losses_of(saved_at(store, step, saved)) == expected[step]
    assert store.complete_steps() == [2, 4, 5], "by the older evaluation step 3 were as good as step 2, and newer"


def test_the_best_by_the_records_is_kept(base_arguments, command, tmp_path):
    """The learning rate rises until nothing is learnt any more. Written while training waits, for once."""
    rising = ["scheduler=constant", "warmup_proportion=1", "lr=0.3", "evaluate_every=5"]
    kept = ["checkpoint.keep_last=1", "checkpoint.keep_best=1", "checkpoint.async=false", "checkpoint.export=never"]
    code, _, err = command([*base_arguments, *rising, *kept, f"output_dir={tmp_path}"])
    assert code == 0, err
    records = read_records(tmp_path / "metrics.jsonl")
    losses = {r["step"]: r["loss"] for r in records if r["event"] == "evaluation" and r["role"] == "new" and r["step"]}
    assert list(losses) == [5, 10, 15, 20]
    best = min(losses, key=losses.__getitem__)
    assert best != 20
    assert CheckpointStore(tmp_path / "checkpoints").complete_steps() == [best, 20]
    saved = [r for r in records if r["event"] == "checkpoint"]
    assert [r["step"] for r in saved] == [5, 10, 15, 20]
    assert all(r["blocked_seconds"] == r["seconds"] for r in saved)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["checkpoint.keep_best=1", "checkpoint.best_by=nope"], "checkpoint.best_by=nope: no such domain is evaluated"),
        (["checkpoint.best_by=other"], "has no effect without checkpoint.keep_best"),
    ],
)
def test_best_by_what_is_not_there(arguments, says, base_arguments, command, tmp_path):
    code, _, err = command([*base_arguments, f"output_dir={tmp_path / 'run'}", *arguments])
    assert code == 2
    assert says in err
    assert not (tmp_path / "run").exists()


def test_the_losses_of_earlier_versions_are_read(tmp_path):
    """They stood beside the scores; the oldest checkpoints have no scores."""
    store = CheckpointStore(tmp_path)
    for step, scores in ((1, [SCORE | {"loss": 2.0}]), (2, [])):
        saved = state(step)
        saved["progress"] |= {"evaluated_at": step, "losses": {"new": 2.0}, "scores": scores}
        path = saved_at(store, step, saved)
        assert losses_of(path)[0] == {"new": 2.0}
        progress = TrainState()
        progress.load_state_dict(load(path)["progress"])
        assert (progress.step, progress.scores) == (step, scores)
        assert "losses" not in progress.state_dict()
    saved["progress"]["losses"] = "low"
    with pytest.raises(UserError, match=r"progress\.losses"):
        load(saved_at(store, 3, saved | {"progress": saved["progress"] | {"step": 3}}))
