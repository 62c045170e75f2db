"""Which checkpoints stay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.policy import Policy

COUNT = st.none() | st.integers(1, 4)
LOSSES = st.dictionaries(
    st.integers(1, 60), st.just({}) | st.floats(0, 9).map(lambda loss: {"new": loss, "old": -loss})
)


@given(LOSSES, COUNT, COUNT, COUNT)
def test_what_stays(losses, last, every, best):
    policy = Policy(keep_last=last, keep_every=every, keep_best=best)
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
    assert Policy(keep_last=1, keep_best=1).kept(losses) == {1, 5}
    assert Policy(keep_last=1, keep_best=2, best_by="old").kept(losses) == {4, 5}


def test_a_loss_that_is_no_number_is_not_the_best():
    losses = {5: {"a": 2.0}, 10: {"a": float("nan")}, 15: {"a": 1.0}, 20: {"a": 3.0}}
    assert Policy(keep_last=1, keep_best=1).kept(losses) == {15, 20}


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
