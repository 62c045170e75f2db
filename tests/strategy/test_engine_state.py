"""What an engine writes into a checkpoint, and what it takes from one."""

import json

import pytest
import torch

from pretrain.distributed import sharding as tensors
from pretrain.distributed.packing import AS_BEFORE
from pretrain.distributed.sharding import TensorFiles
from pretrain.runtime.errors import UserError
from tests.engines import CPU, FULL, HALF, engine_of, same, trained


def files_of(engine, folder) -> dict:
    """What a checkpoint makes of the engine's state."""
    folder.mkdir()
    state = engine.state_dict()
    for kind in ("model", "optimizer"):
        tensors.write(folder / kind, state[kind])
    read = {kind: TensorFiles([folder / kind]) for kind in ("model", "optimizer") if (folder / kind).exists()}
    in_json = {k: state[k] for k in ("scaler", "tensors", "optimizer_values") if k in state}
    return {"optimizer": TensorFiles([])} | read | json.loads(json.dumps(in_json))


def pieces_of(engine) -> dict:
    state = engine.state_dict()
    return {
        f"{kind}:{name}": piece.tensor.clone() for kind in ("model", "optimizer") for name, piece in state[kind].items()
    }


def test_what_is_written():
    engine = trained(engine_of())
    engine.skipped += 3
    state = engine.state_dict()
    assert state.keys() == {"model", "optimizer", "tensors", "scaler"}
    named = dict(engine.model.hf_named_parameters())
    assert state["model"].keys() == named.keys()
    assert state["optimizer"].keys() == {f"{name}/{key}" for name in named for key in ("exp_avg", "exp_avg_sq", "step")}
    assert state["tensors"]["model"]["model.norm.weight"] == ("float32", [32])
    assert state["tensors"]["optimizer"]["model.norm.weight/step"] == ("float32", [])
    assert state["tensors"]["model"].keys() == named.keys()
    assert state["tensors"]["optimizer"].keys() == state["optimizer"].keys()
    assert state["scaler"] == {"skipped": 3}
    for name, parameter in named.items():
        assert torch.equal(state["model"][name].tensor, parameter)
        assert torch.equal(state["optimizer"][f"{name}/exp_avg"].tensor, engine.optimizer.state[parameter]["exp_avg"])
    assert same(dict(engine.full_weights()), {n: p.detach() for n, p in named.items()})
    assert not any(t.requires_grad for _, t in engine.full_weights())


def test_before_the_first_step_there_are_no_moments():
    state = engine_of().state_dict()
    assert (state["optimizer"], state["tensors"]["optimizer"]) == ({}, {})
    assert len(state["model"]) > 0


def test_what_other_ranks_hold_as_well():
    engine = trained(engine_of())
    named = dict(engine.model.hf_named_parameters())
    first = named["model.embed_tokens.weight"]
    engine.optimizer.state[first]["count"] = 4  # no tensor: nothing to compare
    found = dict(engine.replicated())
    assert found.keys() == {
        *named,
        *(f"{name}/{key}" for name in named for key in ("exp_avg", "exp_avg_sq", "step")),
    }
    assert torch.equal(found["model.norm.weight"], named["model.norm.weight"])
    assert torch.equal(
        found["model.norm.weight/exp_avg"], engine.optimizer.state[named["model.norm.weight"]]["exp_avg"]
    )
    half = engine_of(precision=HALF)
    assert float(dict(half.replicated())["the loss scale"]) == 65536.0


@pytest.mark.parametrize("precision", [FULL, HALF], ids=["32-true", "16-mixed"])
def test_it_continues_to_the_last_bit(precision, tmp_path):
    engine = engine_of(precision=precision)
    if precision is HALF:
        engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 1024.0})
    trained(engine)
    engine.skipped += 2
    saved = files_of(engine, tmp_path / "saved")
    other = trained(engine_of(precision=precision), steps=1)
    other.load_state_dict(saved)
    assert int(other.skipped) == int(engine.skipped)
    assert same(pieces_of(other), pieces_of(engine))
    trained(engine)
    trained(other)
    assert same(pieces_of(other), pieces_of(engine))
    assert other.scaler.state_dict() == engine.scaler.state_dict()


def test_a_scaler_of_another_precision_is_no_matter(tmp_path):
    full = trained(engine_of())
    half = engine_of(precision=HALF)
    half.load_state_dict(files_of(full, tmp_path / "full"))
    assert half.scaler.get_scale() == 65536.0
    trained(half)
    full.load_state_dict(files_of(half, tmp_path / "half"))
    assert not full.scaler.is_enabled()
    bare = files_of(full, tmp_path / "bare") | {"scaler": {}}
    full.skipped += 5
    full.load_state_dict(bare)
    assert int(full.skipped) == 0, "a checkpoint that says none has none"


def test_moments_keep_their_type_and_steps_their_place(tmp_path):
    engine = trained(engine_of())
    for state in engine.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].bfloat16()
    saved = files_of(engine, tmp_path / "saved")
    other = engine_of()
    other.load_state_dict(saved)
    for _, parameter in other.model.hf_named_parameters():
        state = other.optimizer.state[parameter]
        assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)
        assert (state["step"].device, float(state["step"])) == (CPU, 2.0)
        assert not any(t.requires_grad for t in state.values())
    assert not any(p.grad is not None for p in other.model.parameters())


def test_a_new_optimizer_starts_without_moments(tmp_path):
    engine = trained(engine_of())
    engine.load_state_dict(files_of(engine, tmp_path / "a") | {"optimizer": TensorFiles([])})
    assert not engine.optimizer.state


def damaged(engine, folder, change, **more) -> dict:
    """The saved state after ``change`` of the optimizer's pieces."""
    saved = files_of(engine, folder)
    pieces = change(dict(engine.state_dict()["optimizer"]))
    tensors.write(folder / "changed", pieces)
    return saved | {"optimizer": TensorFiles([folder / "changed"])} | more


def number(value: float) -> tensors.TensorShard:
    return tensors.TensorShard(torch.tensor(value), 0, ())


SLOT = "model.norm.weight/exp_avg"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda p: p | {"z.weight/exp_avg": number(0)},
            "optimizer state z.weight/exp_avg: the model has no such trainable parameter",
        ),
        (lambda p: p | {SLOT: number(0)}, f"{SLOT} has shape () in the checkpoint and (32,) here; {AS_BEFORE}"),
        (
            lambda p: p | {"model.norm.weight/step": tensors.TensorShard(torch.zeros(32), 0, (32,))},
            f"model.norm.weight/step has shape (32,) in the checkpoint and () here; {AS_BEFORE}",
        ),
    ],
    ids=["an unknown name", "another shape", "a step that is no number"],
)
def test_moments_that_do_not_fit(change, says, tmp_path):
    engine = trained(engine_of())
    before = pieces_of(engine)
    with pytest.raises(UserError) as refused:
        engine.load_state_dict(damaged(engine, tmp_path / "a", change))
    assert str(refused.value) == says
    assert same(pieces_of(engine), before), "nothing is changed"


def test_moments_of_a_frozen_parameter_are_refused(tmp_path):
    engine = trained(engine_of())
    saved = files_of(engine, tmp_path / "a")
    dict(engine.model.hf_named_parameters())["model.norm.weight"].requires_grad_(False)
    with pytest.raises(
        UserError, match=r"^optimizer state model.norm.weight/exp_avg: the model has no such trainable parameter"
    ):
        engine.load_state_dict(saved)


def test_missing_moments_are_refused_where_nothing_says_that_there_were_none(tmp_path):
    engine = trained(engine_of())
    lost = ("lm_head.weight", "model.norm.weight")

    def change(pieces):
        return {slot: piece for slot, piece in pieces.items() if slot.rpartition("/")[0] not in lost}

    with pytest.raises(UserError) as refused:
        engine.load_state_dict(damaged(engine, tmp_path / "a", change, tensors=None))
    assert str(refused.value) == (
        "the checkpoint has no optimizer state for 2 parameters, e.g. lm_head.weight; resume from an earlier one "
        "(resume=<run>/checkpoints/step-…), or start a new run from its weights (model_name=<checkpoint>)"
    )
    engine.load_state_dict(damaged(engine, tmp_path / "b", change))
    engine.load_state_dict(files_of(engine, tmp_path / "c") | {"optimizer": TensorFiles([]), "tensors": None})
