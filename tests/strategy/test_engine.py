"""Forward, backward and update of one process, against the same worked out by hand; ranks: tests/strategy."""

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain.data.batch import Batch
from pretrain.models.language_model import LanguageModel
from pretrain.optim.adamw import AdamW
from pretrain.strategy.engine import Engine, InferenceEngine, _skip_update, never, norm_of
from pretrain.strategy.precision import Precision
from tests.engines import ALONE, BATCH, CPU, FULL, HALF, engine_of, same
from tests.models.tiny import tiny


def gradients(engine) -> dict:
    return {name: p.grad.clone() for name, p in engine.model.hf_named_parameters()}


# Forward ------------------------------------------------------------------------------------------------------------


def test_scoring_is_the_models_own_sum():
    model = LanguageModel(tiny("llama")).eval()
    scorer = InferenceEngine(model, precision=FULL, world=ALONE)
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
    scorer = InferenceEngine(model, precision=FULL, world=ALONE)
    found = scorer.next_tokens(BATCH.input_ids, torch.tensor([3, 15]))
    inner = tiny("llama").eval()
    logits = inner(input_ids=BATCH.input_ids).logits
    assert found.tolist() == [int(logits[0, 3].argmax()), int(logits[1, 15].argmax())]


def test_forwards_compute_in_the_type_that_was_asked_for():
    half = Precision("bf16-mixed", "float32", "bfloat16")
    model = LanguageModel(tiny("llama")).eval()
    full, mixed = (InferenceEngine(model, precision=p, world=ALONE).evaluate(BATCH).sum() for p in (FULL, half))
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


@pytest.mark.parametrize(
    ("device", "groups", "on_device"),
    [
        ("cpu", [(True, "cpu")], False),
        ("meta", [(True, "meta"), (True, "meta")], True),
        ("meta", [(True, "meta"), (False, "meta")], False),
        ("meta", [(None, "meta")], False),
        ("meta", [(True, "cpu")], False),
    ],
)
def test_who_decides_whether_an_update_is_made(device, groups, on_device):
    """The device (here one that computes nothing) where every group has a fused optimizer and lies on it, else the host."""
    made = [{"lr": 1.0, "fused": fused, "params": [torch.empty(1, device=where)]} for fused, where in groups]
    optimizer = SimpleNamespace(
        param_groups=[{k: v for k, v in group.items() if v is not None} for group in made], state={}
    )
    model, world = LanguageModel(tiny("llama")), replace(ALONE, device=torch.device(device))
    engine = Engine(model, optimizer, precision=FULL, world=world)
    assert engine.decides_on_device is on_device
    assert (engine.skipped.device.type, engine.skipped.dtype) == (device, torch.int64)


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
    assert float(engine.loss_scale) == 65536.0, "before the first loss too"
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

    def all_reduce_max(self, tensor):
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
    _skip_update(torch.tensor(refused), optimizer, (), {})
    assert (optimizer.found_inf.dtype, float(optimizer.found_inf)) == (torch.float32, found)


def test_learning_rates_are_scaled_from_their_base():
    engine = engine_of()
    engine.optimizer.param_groups[1]["lr"] = 5e-3
    engine = Engine(engine.model, engine.optimizer, precision=FULL, world=ALONE)
    for scale in (0.5, 0.25):
        assert engine.set_lr(lambda step, scale=scale: scale, 0) == pytest.approx(1e-2 * scale)
        assert [g["lr"] for g in engine.optimizer.param_groups] == pytest.approx([1e-2 * scale, 5e-3 * scale])
