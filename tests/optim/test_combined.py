"""Several optimizers as one: what they share, and that an update is made by all of them or by none."""

import pytest
import torch
from torch import nn

from pretrain.optim.combined import CombinedOptimizer, check_every_parameter, combined
from pretrain.runtime.errors import UserError
from pretrain.strategy.engine import Engine
from tests.engines import ALONE, HALF, engine_of, trained
from tests.optimizers import groups, muon_and_adamw


def two(**more):
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2,), 2.0))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    made = [torch.optim.AdamW([weights[0]], lr=0.1, **more), torch.optim.AdamW([weights[1]], lr=0.2, **more)]
    return weights, combined(made)


def test_groups_and_states_are_shared():
    weights, both = two()
    assert isinstance(both, CombinedOptimizer)
    assert [group["lr"] for group in both.param_groups] == [0.1, 0.2]
    both.param_groups[1]["lr"] = 0.0
    both.step()
    assert not torch.equal(weights[0], torch.ones(3))
    assert torch.equal(weights[1], torch.full((2,), 2.0))
    assert set(both.state) == set(weights)
    assert all(optimizer.state is both.state for optimizer in both.optimizers)
    both.zero_grad(set_to_none=True)
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_fused_updates_are_skipped_together_on_the_device(found):
    weights, both = two(fused=True)
    before = [weight.detach().clone() for weight in weights]
    assert both._step_supports_amp_scaling
    both.found_inf = torch.tensor(found)
    both.step()
    assert [torch.equal(a, b) for a, b in zip(weights, before, strict=True)] == [bool(found)] * 2
    assert not any(hasattr(optimizer, "found_inf") for optimizer in both.optimizers)


@pytest.mark.parametrize("make", [muon_and_adamw, groups])
def test_an_infinite_gradient_skips_all_of_them(make):
    engine = engine_of(precision=HALF)
    engine = Engine(engine.model, make(list(engine.model.hf_named_parameters())), precision=HALF, world=ALONE)
    trained(engine, steps=1)
    before = {name: p.detach().clone() for name, p in engine.model.hf_named_parameters()}
    last = next(p for p in engine.optimizer.param_groups[-1]["params"])
    hook = last.register_hook(lambda grad: grad * torch.inf)
    trained(engine, steps=1)
    hook.remove()
    assert all(torch.equal(p, before[name]) for name, p in engine.model.hf_named_parameters())
    assert (int(engine.skipped), engine.scaler.get_scale()) == (1, 32768.0)
    trained(engine, steps=1)
    changed = {name for name, p in engine.model.hf_named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(before)


def test_one_is_itself():
    weight = nn.Parameter(torch.ones(1))
    adamw = torch.optim.AdamW([weight])
    assert combined(adamw) is combined([adamw]) is adamw


def test_what_a_factory_must_not_return():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match=r"^optimizer: its factory has returned no optimizer$"):
        combined([])
    with pytest.raises(UserError, match=r"^optimizer: a parameter belongs to one optimizer: some parameters appear in"):
        combined([torch.optim.AdamW([weight]), torch.optim.SGD([weight])])


def test_a_parameter_that_nobody_updates_is_named():
    weights, both = two()
    named = [("a", weights[0]), ("b", weights[1]), ("c", nn.Parameter(torch.ones(1), requires_grad=False))]
    check_every_parameter(both, named)
    with pytest.raises(
        UserError, match=r"^optimizer: no group has b; give every parameter that is trained to one optimizer"
    ):
        check_every_parameter(both.optimizers[0], named)
