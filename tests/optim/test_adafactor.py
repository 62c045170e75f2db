"""Adafactor equals torch's, and rejects a step as a whole."""

from types import SimpleNamespace

import pytest
import torch
from test_adamw import parameters, train
from torch import nn

from pretrain.optim.adafactor import Adafactor
from pretrain.optim.adamw import AdamW
from pretrain.run.peak_lr import chosen_lr

EPS = (1e-30, 1e-3)  # the paper's constants; torch's default is the dtype's resolution in place of the first


class Scaled:
    """An optimizer whose gradients are multiplied before each step."""

    def __init__(self, named, optimizer, factor):
        self.named, self.optimizer, self.factor = named, optimizer, factor

    def step(self):
        for p in self.named.values():
            p.grad *= self.factor
        self.optimizer.step()


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_it_equals_torchs(factor):
    ours, theirs = parameters(), parameters()
    train(ours, Scaled(ours, Adafactor(lr=1e-2, weight_decay=0.0)(ours.items()), factor), 20)
    train(theirs, Scaled(theirs, torch.optim.Adafactor(theirs.values(), lr=1e-2, eps=EPS), factor), 20)
    for name, p in ours.items():
        assert torch.allclose(p, theirs[name], rtol=1e-4, atol=1e-7), name


@torch.no_grad()
@pytest.mark.parametrize("factor", [1.0, 1e-4])
def test_weights_of_16_bits_follow_fp32(factor):
    """Also with gradients as small as those of a large model, of which only the direction counts."""
    exact, ours, start = parameters(), parameters(torch.bfloat16), parameters()
    for named in (exact, ours):
        train(named, Scaled(named, Adafactor(lr=1e-3, weight_decay=0.0)(named.items()), factor), 100)
    for name, p in ours.items():
        assert float((p.float() - exact[name]).norm() / (exact[name] - start[name]).norm()) < 0.5, name


@torch.no_grad()
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_an_update_has_unit_size_and_no_gradient_makes_none(weights):
    """Rows and columns without a gradient, as those of tokens that do not occur, stay as they are."""
    weight = nn.Parameter(torch.ones(8, 6, dtype=weights))
    weight.grad = torch.full_like(weight, 1e-5)
    weight.grad[2], weight.grad[:, 3] = 0.0, 0.0
    Adafactor(lr=2**-6, weight_decay=0.0)({"up.weight": weight}.items()).step()
    assert torch.equal(weight[2], torch.ones_like(weight[2]))
    assert torch.equal(weight[:, 3], torch.ones_like(weight[:, 3]))
    assert weight[0, 0].item() == pytest.approx(1 - 2**-6, abs=2**-7)


@torch.no_grad()
def test_weight_decay_is_as_strong_as_adamws():
    """With elements of 0.02, a relative rate of 3e-2 and a rate of 6e-4 are the same, and so is the decay."""
    found = []
    for spec in (Adafactor(lr=3e-2, weight_decay=0.1), AdamW(lr=6e-4, weight_decay=0.1)):
        weight = nn.Parameter(torch.full((8, 8), 0.02))
        weight.grad = torch.zeros_like(weight)
        spec({"up.weight": weight}.items()).step()
        found.append(float(1 - weight[0, 0].double() / torch.tensor(0.02).double()))
    assert found == pytest.approx([6e-5, 6e-5], rel=2e-3)


def test_auto_is_a_relative_rate():
    rates = [
        chosen_lr(SimpleNamespace(lr="auto", optimizer=made), None, lambda: 134_515_008)
        for made in (Adafactor(lr=1.0), AdamW(lr=1.0), lambda named: None)
    ]
    assert rates == pytest.approx([9e-3, 3e-4, 3e-4])


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_rejected_step_changes_nothing(weights):
    named = parameters(weights)
    optimizer = Adafactor(lr=1e-2)(named.items())
    train(named, optimizer, 2)
    bits = lambda: [t.clone() for p in named.values() for t in (p.detach(), *optimizer.state[p].values())]  # noqa: E731
    before = bits()
    for p in named.values():
        p.grad = torch.full_like(p, torch.inf)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(bits(), before, strict=True))
