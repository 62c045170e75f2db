"""Forward, backward, update and state of one process, against the same worked out by hand; ranks: tests/strategy."""

import json
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain import tensors
from pretrain.batch import Batch
from pretrain.engine import Engine, Scorer, _leave_out, never, norm_of
from pretrain.errors import UserError
from pretrain.models.language_model import LanguageModel
from pretrain.optim.adamw import AdamW
from pretrain.precision import Precision
from pretrain.tensors import TensorFiles
from pretrain.world import World
from tests.models.tiny import tiny

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
FULL = Precision("32-true", "float32", "float32")
HALF = Precision("16-mixed", "float32", "float16", allow_cpu=True)
IDS = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(0))
BATCH = Batch(IDS[:, :-1], IDS[:, 1:], None, 32)


def engine_of(name="llama", precision=FULL, world=ALONE, **more) -> Engine:
    model = LanguageModel(tiny(name))
    return Engine(model, AdamW(lr=1e-2)(model.hf_named_parameters()), precision=precision, world=world, **more)


def gradients(engine) -> dict:
    return {name: p.grad.clone() for name, p in engine.model.hf_named_parameters()}


def trained(engine, steps=2) -> Engine:
    for _ in range(steps):
        engine.backward(BATCH, tokens=32, last=True)
        engine.step(1.0)
    return engine


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Forward ------------------------------------------------------------------------------------------------------------


def test_scoring_is_the_models_own_sum():
    model = LanguageModel(tiny("llama")).eval()
    scorer = Scorer(model, precision=FULL, world=ALONE)
    assert scorer.num_parameters == sum(p.numel() for p in model.parameters())
    found = scorer.evaluate(BATCH)
    logits = tiny("llama").eval()(input_ids=BATCH.input_ids).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), BATCH.labels.flatten(), reduction="sum")
    assert float(found.sum()) == pytest.approx(float(expected), rel=1e-5)
    assert not found.requires_grad
    positions = torch.arange(16).repeat(2, 1) % 5
    assert float(scorer.evaluate(replace(BATCH, position_ids=positions)).sum()) != pytest.approx(float(found.sum()))


def test_the_likeliest_tokens():
    model = LanguageModel(tiny("llama")).eval()
    scorer = Scorer(model, precision=FULL, world=ALONE)
    found = scorer.next_tokens(BATCH.input_ids, torch.tensor([3, 15]))
    inner = tiny("llama").eval()
    logits = inner(input_ids=BATCH.input_ids).logits
    assert found.tolist() == [int(logits[0, 3].argmax()), int(logits[1, 15].argmax())]


def test_forwards_compute_in_the_type_that_was_asked_for():
    half = Precision("bf16-mixed", "float32", "bfloat16")
    model = LanguageModel(tiny("llama")).eval()
    full, mixed = (Scorer(model, precision=p, world=ALONE).evaluate(BATCH).sum() for p in (FULL, half))
    assert float(full) != float(mixed) == pytest.approx(float(full), rel=1e-2)


# Backward and update ------------------------------------------------------------------------------------------------


def test_accumulation_adds_up_to_the_mean_over_all_targets():
    whole, parts, averaging = engine_of(), engine_of(), engine_of(replicas=4)
    loss = whole.backward(BATCH, tokens=32, last=True)
    rows = [Batch(BATCH.input_ids[i : i + 1], BATCH.labels[i : i + 1], None, 16) for i in range(2)]
    sums = [parts.backward(row, tokens=32, last=row is rows[1]) for row in rows]
    assert not loss.requires_grad
    assert float(sum(sums)) == pytest.approx(float(loss), rel=1e-5)
    assert float(loss) == pytest.approx(math.log(97), rel=0.05), "of a model that knows nothing"
    for name, gradient in gradients(parts).items():
        assert torch.allclose(gradient, gradients(whole)[name], atol=1e-6), name
    assert float(averaging.backward(BATCH, tokens=32, last=True)) == float(loss)
    assert torch.allclose(gradients(averaging)["lm_head.weight"], 4 * gradients(whole)["lm_head.weight"])


def test_positions_reach_the_model():
    plain, packed = engine_of(), engine_of()
    positions = torch.arange(16).repeat(2, 1) % 5
    losses = [
        e.backward(replace(BATCH, position_ids=p), tokens=32, last=True)
        for e, p in ((plain, None), (packed, positions))
    ]
    assert float(losses[0]) != pytest.approx(float(losses[1]), rel=1e-6)


def test_what_is_called_in_a_step():
    called = []

    class Wrapper(nn.Module):
        def forward(self, *inputs):
            called.append(inputs)
            return engine.model(*inputs)

    engine = engine_of(step_module=Wrapper(), sharded_export=True, replicas=2)
    engine.backward(BATCH, tokens=32, last=True)
    assert len(called) == 1
    assert engine.sharded_export is True
    plain = engine_of()
    assert plain.step_module is plain.model
    assert (plain.replicas, plain.sharded_export, plain.decides_on_device) == (1, False, False)
    assert (plain.skipped.dtype, int(plain.skipped)) == (torch.int64, 0)


def test_last_is_passed_on():
    engine, seen = engine_of(), []
    keep = engine.communication
    engine.communication = lambda last: seen.append(last) or keep(last)
    for last in (False, True):
        engine.backward(BATCH, tokens=32, last=last)
    assert seen == [False, True]


@pytest.mark.parametrize(("max_norm", "factor"), [(None, 1.0), (1e9, 1.0), (0.5, None)])
def test_the_norm_and_what_is_clipped(max_norm, factor):
    engine = engine_of()
    engine.backward(BATCH, tokens=32, last=True)
    before = gradients(engine)
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in before.values()))
    assert float(engine.clip(max_norm)) == pytest.approx(expected, rel=1e-5)
    factor = 0.5 / expected if factor is None else factor
    for name, gradient in gradients(engine).items():
        assert torch.allclose(gradient, before[name] * factor, rtol=1e-4), name


def test_parameters_without_a_gradient_count_for_nothing():
    some = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)] + [nn.Parameter(torch.zeros(2))]
    some[0].grad, some[3].grad = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([0.0, 12.0])
    assert float(norm_of(some)) == pytest.approx(13.0)


def test_a_step_is_adamws_on_clipped_gradients():
    engine, theirs = engine_of(), tiny("llama")
    optimizer = AdamW(lr=1e-2)(theirs.named_parameters())
    for _ in range(2):
        engine.backward(BATCH, tokens=32, last=True)
        for (_, ours), other in zip(engine.model.hf_named_parameters(), theirs.parameters(), strict=True):
            other.grad = ours.grad.clone()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        assert float(engine.step(0.5)) == pytest.approx(float(norm), rel=1e-5)
        assert all(p.grad is None for p in engine.model.parameters())
    for (name, ours), other in zip(engine.model.hf_named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours, other, atol=1e-6), name
    assert int(engine.skipped) == 0


def test_a_norm_that_is_not_finite_counts_under_a_scaler_only():
    """Without a scaler it is the guard that refuses it or does not."""
    for precision, counted in ((FULL, 0), (HALF, 1)):
        engine = engine_of(precision=precision)
        engine.backward(BATCH, tokens=32, last=True)
        next(engine.model.parameters()).grad.fill_(math.inf)
        assert not math.isfinite(float(engine.step(None)))
        assert int(engine.skipped) == counted


def test_the_loss_scale():
    assert engine_of().loss_scale is None
    engine = engine_of(precision=HALF)
    assert engine.loss_scale is None, "torch makes it with the first loss"
    engine.backward(BATCH, tokens=32, last=True)
    assert float(engine.loss_scale) == 65536.0
    next(engine.model.parameters()).grad.fill_(math.inf)
    engine.step(None)
    assert float(engine.loss_scale) == 32768.0, "the scaler has heard of it"


def test_never_refuses():
    found = never(torch.tensor(math.nan))
    assert (found.dtype, found.shape, bool(found)) == (torch.bool, (), False)


@dataclass
class OtherRank:
    """A world of two, in which the other rank has found what ``infinite`` says."""

    infinite: float
    size: int = 2
    rank: int = 0
    device: torch.device = CPU
    is_main: bool = True
    asked: list = field(default_factory=list)

    def largest(self, tensor):
        self.asked.append(float(tensor))
        return tensor.fill_(max(float(tensor), self.infinite))


@pytest.mark.parametrize(
    ("mine", "others", "nan"), [(1.0, 0.0, False), (1.0, 1.0, True), (math.inf, 0.0, False), (1e25, 0.0, False)]
)
def test_what_another_ranks_scaler_finds_is_left_out_here(mine, others, nan):
    """Its gradients are finite here, and the norm is told as nan; one that is infinite here stays infinite, also where only
    the sum of the squares is."""
    world = OtherRank(others)
    engine = engine_of(precision=HALF, world=world)
    engine.backward(BATCH, tokens=32, last=True)
    for p in engine.model.parameters():
        p.grad.fill_(65536.0 * mine)
    before = {name: p.detach().clone() for name, p in engine.model.hf_named_parameters()}
    norm, infinite = float(engine.step(None)), mine > 1e20
    assert math.isnan(norm) is nan
    assert math.isinf(norm) is infinite
    left_out = bool(others or infinite)
    assert world.asked == [float(infinite)]
    assert int(engine.skipped) == left_out
    assert same(before, dict(engine.model.hf_named_parameters())) is left_out


def test_nobody_is_asked_without_a_scaler():
    world = OtherRank(1.0)
    engine = engine_of(world=world)
    engine.backward(BATCH, tokens=32, last=True)
    assert math.isfinite(float(engine.step(None)))
    assert world.asked == []


@pytest.mark.parametrize(
    ("refused", "by_scaler", "found"), [(True, None, 1), (False, None, 0), (False, 1, 1), (True, 1, 1), (True, 0, 1)]
)
def test_both_reasons_to_leave_an_update_out(refused, by_scaler, found):
    optimizer = SimpleNamespace() if by_scaler is None else SimpleNamespace(found_inf=torch.tensor(float(by_scaler)))
    _leave_out(torch.tensor(refused), optimizer, (), {})
    assert (optimizer.found_inf.dtype, float(optimizer.found_inf)) == (torch.float32, found)


def test_learning_rates_are_scaled_from_their_base():
    engine = engine_of()
    engine.optimizer.param_groups[1]["lr"] = 5e-3
    engine = Engine(engine.model, engine.optimizer, precision=FULL, world=ALONE)
    for scale in (0.5, 0.25):
        assert engine.set_lr(scale) == pytest.approx(1e-2 * scale)
        assert [g["lr"] for g in engine.optimizer.param_groups] == pytest.approx([1e-2 * scale, 5e-3 * scale])


# State --------------------------------------------------------------------------------------------------------------


def files_of(engine, folder) -> dict:
    """What a checkpoint makes of the engine's state."""
    folder.mkdir()
    state = engine.state_dict()
    for kind in ("model", "optimizer"):
        tensors.write(folder / kind, state[kind])
    read = {kind: TensorFiles([folder / kind]) for kind in ("model", "optimizer") if (folder / kind).exists()}
    return {"optimizer": TensorFiles([])} | read | json.loads(json.dumps({k: state[k] for k in ("scaler", "tensors")}))


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
    assert same(dict(engine.whole_weights()), {n: p.detach() for n, p in named.items()})
    assert not any(t.requires_grad for _, t in engine.whole_weights())


def test_only_the_first_rank_writes_whole_tensors():
    engine = trained(engine_of())
    engine.world = World(1, 2, CPU)
    state = engine.state_dict()
    assert (state["model"], state["optimizer"]) == ({}, {})
    assert len(state["tensors"]["model"]) > 0


def test_a_number_in_an_optimizers_state_is_written():
    engine = trained(engine_of())
    first = next(p for _, p in engine.model.hf_named_parameters())
    engine.optimizer.state[first]["count"] = 4
    assert pieces_of(engine)["optimizer:model.embed_tokens.weight/count"].item() == 4


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
    assert "the loss scale" not in dict(half.replicated())
    half.backward(BATCH, tokens=32, last=True)
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


def number(value: float) -> tensors.Piece:
    return tensors.Piece(torch.tensor(value), 0, ())


SLOT = "model.norm.weight/exp_avg"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda p: p | {"z.weight/exp_avg": number(0)},
            "optimizer state z.weight/exp_avg: the model has no such parameter that is trained",
        ),
        (lambda p: p | {SLOT: number(0)}, f"weights that do not fit the model: {SLOT} is (), the model's (32,)"),
        (
            lambda p: p | {"model.norm.weight/step": tensors.Piece(torch.zeros(32), 0, (32,))},
            "weights that do not fit the model: model.norm.weight/step is (32,), the model's ()",
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
    with pytest.raises(UserError, match=r"^optimizer state model.norm.weight/exp_avg: the model has no such parameter"):
        engine.load_state_dict(saved)


def test_missing_moments_are_refused_where_nothing_says_that_there_were_none(tmp_path):
    engine = trained(engine_of())
    lost = ("lm_head.weight", "model.norm.weight")

    def change(pieces):
        return {slot: piece for slot, piece in pieces.items() if slot.rpartition("/")[0] not in lost}

    with pytest.raises(UserError) as refused:
        engine.load_state_dict(damaged(engine, tmp_path / "a", change, tensors=None))
    assert str(refused.value) == (
        "the checkpoint has no optimizer state of 2 parameters, e.g. lm_head.weight; continue from an earlier one "
        "(resume=<run>/checkpoints/step-…), or start a new run from its weights (model_name=<checkpoint>)"
    )
    engine.load_state_dict(damaged(engine, tmp_path / "b", change))
    engine.load_state_dict(files_of(engine, tmp_path / "c") | {"optimizer": TensorFiles([]), "tensors": None})
