from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pretrain.optim import compensated
from pretrain.optim.adamw import AdamW, decay_groups
from pretrain.optim.compensated import CompensatedAdamW


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Weights as a trained model has them: 0.02 wide; norms at 1."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.02  # noqa: E731
    tensors = {
        "embed.weight": draw(40, 16),
        "up.weight": draw(16, 24),
        "up.bias": draw(24),
        "norm.weight": torch.ones(16),
    }
    return {name: nn.Parameter(t.bfloat16().to(dtype)) for name, t in tensors.items()}


def train(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """The same gradients in every precision: a constant pull and noise."""
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(named.values()):
            pull = torch.randn(p.shape, generator=torch.Generator().manual_seed(-1 - i))
            p.grad = (pull + torch.randn(p.shape, generator=generator)).bfloat16().to(p.dtype)
        optimizer.step()


def test_bf16_stalls_with_plain_adamw_and_follows_fp32_with_ours() -> None:
    """300 steps at lr 2e-5: norm weights of 1 move by 0.006 in fp32; bf16 numbers near 1 are 0.004 to 0.008 apart."""
    spec = AdamW(lr=2e-5, weight_decay=0.01)
    exact, ours, plain = parameters(), parameters(torch.bfloat16), parameters(torch.bfloat16)
    start = {n: p.detach().float().clone() for n, p in exact.items()}
    train(exact, spec(exact.items()), 300)
    train(ours, spec(ours.items()), 300)
    train(plain, AdamW(lr=2e-5, weight_decay=0.01, compensate=False)(plain.items()), 300)

    def off(named: dict[str, nn.Parameter], name: str) -> float:
        """Distance to the fp32 weights, as a share of the way these went."""
        way = (exact[name].detach() - start[name]).norm()
        return float((named[name].detach().float() - exact[name].detach()).norm() / way)

    assert torch.equal(plain["norm.weight"].float(), start["norm.weight"])
    assert off(plain, "norm.weight") == 1.0
    assert off(plain, "up.weight") > 0.25
    assert off(ours, "up.weight") < 0.05
    rounded = {n: p.detach().bfloat16() for n, p in exact.items()}
    for name, p in ours.items():  # half a bf16 step is the best that bf16 weights can be
        best = float((rounded[name].float() - exact[name].detach()).norm())
        assert float((p.float() - exact[name]).norm().detach()) <= 1.1 * best + 1e-6, name


def test_with_its_compensation_it_is_fp32_adamw() -> None:
    spec = AdamW(lr=1e-3)
    exact, ours = parameters(), parameters(torch.bfloat16)
    train(exact, spec(exact.items()), 100)
    optimizer = spec(ours.items())
    assert isinstance(optimizer, CompensatedAdamW)
    train(ours, optimizer, 100)
    start = parameters()
    for name, p in ours.items():
        whole = p.float() + optimizer.state[p]["compensation"].float()
        assert (
            float((whole - exact[name]).detach().norm() / (exact[name].detach() - start[name].detach()).norm()) < 5e-3
        ), name


def test_fp32_parameters_of_a_bf16_model_get_torchs_adamw() -> None:
    exact, mixed = parameters(), parameters()
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    train(exact, torch.optim.AdamW(decay_groups(exact.items(), 0.1), fused=True, **settings), 10)
    train(mixed, CompensatedAdamW(decay_groups(mixed.items(), 0.1), **settings), 10)
    assert all(torch.equal(mixed[n], exact[n]) for n in exact)


@pytest.mark.parametrize("fused", [True, False])
def test_chunks_do_not_show(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = parameters(torch.bfloat16), parameters(torch.bfloat16)
    train(whole, AdamW(lr=1e-3, fused=fused)(whole.items()), 5)
    monkeypatch.setitem(compensated.CHUNK, "cpu", 64)
    train(cut, AdamW(lr=1e-3, fused=fused)(cut.items()), 5)
    assert all(torch.equal(whole[n], cut[n]) for n in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(dtype: torch.dtype) -> None:
    """State is per parameter and all tensors; put back as it was, the run continues bit for bit."""
    spec = AdamW(lr=1e-3)
    straight, stopped = parameters(dtype), parameters(dtype)
    train(straight, spec(straight.items()), 10)
    first = spec(stopped.items())
    train(stopped, first, 5)
    assert all(isinstance(v, torch.Tensor) for state in first.state.values() for v in state.values())
    again = {n: nn.Parameter(p.detach().clone()) for n, p in stopped.items()}
    second = spec(again.items())
    for name, p in again.items():
        second.state[p] = {k: v.clone() for k, v in first.state[stopped[name]].items()}
    train(again, second, 5, start=5)
    assert all(torch.equal(again[n], straight[n]) for n in straight)


def test_fused_and_not_fused_share_their_state() -> None:
    fused, other = parameters(), parameters()
    train(fused, one := AdamW(lr=1e-3)(fused.items()), 3)
    train(other, two := AdamW(lr=1e-3, fused=False)(other.items()), 3)
    for name, p in fused.items():
        state = two.state[other[name]]
        for key, value in one.state[p].items():
            assert torch.allclose(value, state[key], rtol=1e-5, atol=1e-9), (name, key)
        assert torch.allclose(p, other[name], atol=1e-6)


def test_decay_on_matrices_only() -> None:
    named = parameters() | {
        "experts.up_bias": nn.Parameter(torch.ones(2, 3)),
        "experts.up": nn.Parameter(torch.ones(2, 3, 4)),
    }
    named["frozen"] = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    decayed, others = decay_groups(named.items(), 0.1)
    names = {id(p): n for n, p in named.items()}
    assert {names[id(p)] for p in decayed["params"]} == {"embed.weight", "up.weight", "experts.up"}
    assert {names[id(p)] for p in others["params"]} == {"up.bias", "norm.weight", "experts.up_bias"}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decay_groups([("w", nn.Parameter(torch.ones(2, 2)))], 0.1)) == 1


def test_decay_shrinks_what_gets_no_gradient() -> None:
    named = parameters()
    optimizer = AdamW(lr=0.1, weight_decay=0.5)(named.items())
    before = {n: p.detach().clone() for n, p in named.items()}
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(named["up.weight"], before["up.weight"] * 0.95)
    assert torch.equal(named["up.bias"], before["up.bias"])
