"""What is told of each layer, against the same worked out by hand; several processes: tests/test_parity.py."""

import pytest
import torch

from pretrain.distributed.context import DistributedContext
from pretrain.models.language_model import LanguageModel
from pretrain.strategy.engine import Engine, never
from pretrain.strategy.precision import Precision
from pretrain.telemetry.interval import Interval
from pretrain.training.layer_statistics import LayerStatistics, layer_of
from tests.models.tiny import tiny

IDS = torch.arange(32).reshape(2, 16)


@pytest.fixture
def engine():
    model = LanguageModel(tiny("llama"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    precision = Precision("32-true", "float32", "float32")
    engine = Engine(model, optimizer, precision=precision, world=DistributedContext(), grad_clip=0.5)
    model(IDS, IDS).backward()
    return engine


def observed(watch, engine, step, *, refuse=never):
    """The norm of the engine's step, and what was observed of it."""
    watch.before_step(step)
    total = engine.step(engine.grad_clip, refuse=refuse)
    return total, watch.after_step(total)


def norm(tensors) -> float:
    return float(sum(t.square().sum() for t in tensors)) ** 0.5


def test_norms_of_a_clipped_step(engine, monkeypatch):
    named = dict(engine.model.hf_named_parameters())
    mine = [name for name in named if name.startswith("model.layers.1.")]
    before = {name: p.detach().clone() for name, p in named.items()}
    gradient = norm(named[name].grad for name in mine)
    watch = LayerStatistics(engine, Interval(2))
    monkeypatch.setattr(torch, "full_like", pytest.fail)  # a kernel a parameter, for a step without gradients only
    total, found = observed(watch, engine, 2)
    assert total > 0.5, "clipping must have something to do"
    assert found.names == ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    row = found.norms[found.names.index("model.layers.1")].tolist()
    update = norm(named[name].detach() - before[name] for name in mine)
    weight = norm(before[name] for name in mine)
    assert row == pytest.approx([weight, gradient, update, update / weight], rel=1e-5)
    assert norm(found.norms[:, 1:2]) == pytest.approx(float(total), rel=1e-5)
    assert watch.after_step(total) is None, "reported once"


def test_a_step_that_is_not_due_costs_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine.optimizer, "register_step_pre_hook", pytest.fail)
    monkeypatch.setattr(engine.model, "hf_named_parameters", pytest.fail)
    for watch in (LayerStatistics(engine, Interval(2)), LayerStatistics(engine, Interval(None))):
        watch.before_step(3)
        assert watch.after_step(torch.ones(())) is None


def test_a_refused_step_has_no_update_and_no_gradients_to_tell(engine):
    watch = LayerStatistics(engine, Interval(1))
    _, found = observed(watch, engine, 1, refuse=lambda norm: torch.ones_like(norm, dtype=torch.bool))
    weights, gradients, updates, ratios = found.norms.unbind(1)
    assert (weights > 0).all()
    assert gradients.isnan().all()
    assert not updates.any()
    assert not ratios.any()


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.layers.10.self_attn.q_proj.weight", "model.layers.10"),
        ("transformer.h.3.mlp.c_fc.bias", "transformer.h.3"),
        ("transformer.wte.weight", "transformer.wte"),
        ("lm_head.weight", "lm_head"),
        ("bare", "bare"),
    ],
)
def test_layers_are_blocks_and_what_is_outside_of_them(parameter, layer):
    assert layer_of(parameter) == layer
