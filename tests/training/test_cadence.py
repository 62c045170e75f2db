"""When a run evaluates and saves; a combination of keys that would silently save nothing says so, or saves all the same."""

import pytest

from pretrain.checkpoint.store import CheckpointStore
from pretrain.training.cadence import cadence

KEYS = {"steps": 1000, "epoch_steps": 300, "evaluate_every": 100, "save_every": 50}

WHAT = [  # keys → evaluates every, saves every, what is said
    ({}, 100, 50, ""),
    ({"with_evaluation": True}, 100, 100, ""),
    ({"with_evaluation": True, "evaluate_every": None}, None, 50, "the run saves every 50 (save_every)"),
    ({"with_evaluation": True, "evaluate_every": 1000}, 1000, 50, "the run saves every 50 (save_every)"),
    ({"with_evaluation": True, "evaluate_every": 999}, 999, 999, ""),
    (
        {"with_evaluation": True, "evaluate_every": 2000, "save_every": None},
        2000,
        2000,
        "a run that dies restarts at step 0",
    ),
    ({"with_evaluation": True, "per_epoch": 1, "steps": 200}, 300, 50, "the run saves every 50 (save_every)"),
    ({"save_every": 1000}, 100, 1000, "save_every=1000: no checkpoint comes before the end of 1000 steps"),
    ({"save_every": 1001}, 100, 1001, "save_every=1001: no checkpoint comes before the end of 1000 steps"),
    ({"save_every": 100, "steps": 100}, 100, 100, ""),
    ({"save_every": None}, 100, None, ""),
    ({"save_every": None, "evaluate_every": None}, None, None, ""),
    ({"per_epoch": 3}, 100, 50, ""),
    (
        {"per_epoch": 400},
        1,
        50,
        "evaluation.per_epoch=400: an epoch has 300 steps; the run evaluates after each of them",
    ),
    ({"keep_every": 100}, 100, 50, ""),
    ({"keep_every": 30}, 100, 50, ""),
    ({"keep_every": 77}, 100, 50, "checkpoint.keep_every=77: keeps none, because checkpoints come every 50 steps"),
]


@pytest.mark.parametrize(("keys", "evaluates", "saves", "says"), WHAT)
def test_when(keys, evaluates, saves, says):
    found = cadence(**KEYS | keys)
    assert (found.evaluate_every, found.save_every) == (evaluates, saves)
    assert len(found.notices) == bool(says)
    assert says in "".join(found.notices)


def test_a_run_that_saves_with_evaluations_it_has_not(base_arguments, command, tmp_path):
    given = [
        "checkpoint.with_evaluation=true",
        "evaluate_every=null",
        "checkpoint.keep_last=null",
        "evaluation.samples=0",
    ]
    given += ["checkpoint.export=never", "sink=jsonl", "save_every=3", "max_steps=7", f"output_dir={tmp_path}"]
    code, _, err = command([*base_arguments, *given])
    assert code == 0, err
    assert CheckpointStore(tmp_path / "checkpoints").complete_steps() == [3, 6, 7]
    assert (
        err.count("checkpoint.with_evaluation=true, evaluate_every=null: no evaluation comes before the end of 7 steps")
        == 1
    )
