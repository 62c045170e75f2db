"""`LossScaler`, and what it needs of torch's `GradScaler`, also of its private parts."""

import pytest
import torch
from torch import nn

from pretrain.strategy.loss_scaler import LossScaler

CPU = torch.device("cpu")


@pytest.fixture
def parts():
    """A weight of one, its optimizer and an enabled scaler."""
    weight = nn.Parameter(torch.ones(1))
    return weight, torch.optim.SGD([weight], lr=0.5), LossScaler("cpu")


def train(weight, optimizer, scaler, *, factor=1.0, other_rank_found=False):
    optimizer.zero_grad()
    scaler.scale((weight * factor).sum()).backward()
    scaler.unscale_(optimizer)
    flags = scaler.found_inf(optimizer)
    if other_rank_found:
        for flag in flags:
            flag.fill_(1)
    scaler.step(optimizer)
    scaler.update()
    return flags


def test_the_scale_on_the_device(parts):
    scaler = parts[-1]
    assert scaler.scale_on(CPU).item() == 65536.0, "also before it is used"
    assert train(*parts)[0].item() == 0
    assert parts[0].item() == 0.5
    before = scaler.scale_on(CPU)
    assert (before.dtype, before.shape) == (torch.float32, ())
    train(*parts, factor=float("inf"))
    assert (before.item(), scaler.scale_on(CPU).item(), scaler.get_scale()) == (65536.0, 32768.0, 32768.0)
    assert LossScaler("cpu", enabled=False).scale_on(CPU) is None


def test_the_flags_are_those_that_the_scaler_reads(parts):
    weight, _, scaler = parts
    (flag,) = train(*parts, factor=float("inf"))
    assert (flag.dtype, flag.shape, flag.item()) == (torch.float32, (), 1)
    assert weight.item() == 1, "no update"
    train(*parts, other_rank_found=True)
    assert weight.item() == 1, "no update if another rank found one"
    assert scaler.get_scale() == 16384.0
    train(*parts)
    assert weight.item() == 0.5


def test_the_names_in_its_state(parts):
    """They are the names in checkpoints, of DeepSpeed's runs too."""
    train(*parts)
    expected = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 1,
    }
    assert parts[-1].state_dict() == expected
