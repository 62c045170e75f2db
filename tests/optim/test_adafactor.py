"""Adafactor equals torch's, and rejects a step as a whole."""

import pytest
import torch
from test_adamw import parameters, train

from pretrain.optim.adafactor import Adafactor
from pretrain.optim.adamw import decay_groups


def test_it_equals_torchs():
    ours, theirs = parameters(), parameters()
    train(ours, Adafactor(lr=1e-2, weight_decay=0.1)(ours.items()), 20)
    train(theirs, torch.optim.Adafactor(decay_groups(theirs.items(), 0.1), lr=1e-2), 20)
    for name, p in ours.items():
        assert torch.allclose(p, theirs[name], rtol=1e-4, atol=1e-7), name


@torch.no_grad()
def test_weights_of_16_bits_follow_fp32():
    exact, ours, start = parameters(), parameters(torch.bfloat16), parameters()
    for named in (exact, ours):
        train(named, Adafactor(lr=1e-3, weight_decay=0.0)(named.items()), 100)
    for name, p in ours.items():
        assert float((p.float() - exact[name]).norm() / (exact[name] - start[name]).norm()) < 0.5, name


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
