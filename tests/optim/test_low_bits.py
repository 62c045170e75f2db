"""Moments in 16 and 8 bits: what their storage can represent, and that training follows that with fp32 moments."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_adamw import parameters, train
from torch import nn

from pretrain.optim.adamw import AdamW
from pretrain.optim.compensated import CompensatedAdamW
from pretrain.optim.low_bits import block_size, dequantize, levels, quantize, rounded_stochastically
from pretrain.runtime.errors import UserError


def test_levels():
    for signed in (True, False):
        known = levels(signed, torch.device("cpu"))
        assert known.shape == (256,)
        assert known.unique().shape == (256,)
        assert torch.equal(known, known.sort().values)
        assert known[-1] == 1
        assert (known == 0).sum() == 1
    assert levels(True, torch.device("cpu"))[127] == 0


@given(st.integers(1, 10**6))
def test_blocks_divide_rows(columns):
    size = block_size(columns)
    assert size in (0, 16, 32, 64, 128, 256)
    assert size == 0 or columns % size == 0
    assert size or columns % 16


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=16, max_size=16),
    st.booleans(),
)
def test_a_value_is_stored_as_its_nearest_level(values, signed):
    block = torch.tensor([values]) if signed else torch.tensor([values]).abs()
    codes, scales = quantize(block, signed=signed)
    stored = dequantize(codes, scales, signed=signed)
    nearest = block.double() / scales.double().clamp(min=1e-300) - levels(signed, block.device).double()[:, None, None]
    best = nearest.abs().amin(0) * scales.double()
    off = (stored.double() - block.double()).abs()
    floor = 0 if signed else 6e-7 * scales.double()  # a second moment is never stored as 0
    assert bool((off <= best * 1.001 + block.abs().double() * 2**-12 + floor + 1e-37).all())
    if not signed:
        assert bool(((stored > 0) | (block < 1e-37)).all())
    again, same = quantize(stored, signed=signed)
    if torch.equal(same, scales):  # not where the largest is negative: -1 is no level
        assert torch.equal(dequantize(again, scales, signed=signed), stored), "what was stored once is stored again"


def test_stochastic_rounding_is_right_in_the_mean_and_keeps_what_fits():
    noise = torch.Generator().manual_seed(0)
    values = torch.full((100_000,), 1 + 2**-9)  # a quarter of the way between two neighbours in bf16
    found = rounded_stochastically(values, noise).double()
    assert set(found.tolist()) == {1.0, 1 + 2**-7}
    assert found.mean().item() == pytest.approx(1 + 2**-9, abs=1e-4)
    fits = torch.randn(1000).bfloat16()
    assert torch.equal(rounded_stochastically(fits.float(), noise), fits)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "off"), [("bfloat16", 0.01), ("int8", 0.03)])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_training_follows_fp32_moments(dtype, off, weights):
    exact, ours, start = parameters(), parameters(weights), parameters()
    spec = AdamW(lr=1e-3, beta2=0.999, weight_decay=0.01)
    train(exact, spec(exact.items()), 150)
    optimizer = AdamW(lr=1e-3, beta2=0.999, weight_decay=0.01, moments_dtype=dtype)(ours.items())
    assert isinstance(optimizer, CompensatedAdamW)
    train(ours, optimizer, 150)
    for name, p in ours.items():
        state = optimizer.state[p]
        whole = p.float() + (state["compensation"].float() if weights == torch.bfloat16 else 0)
        assert float((whole - exact[name]).norm() / (exact[name] - start[name]).norm()) < off + 0.005, name
        if dtype == "bfloat16":
            assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
        elif p.ndim > 1 and block_size(p.shape[-1]):
            assert state["exp_avg"]["codes"].dtype == torch.uint8
            assert state["exp_avg"]["scales"].shape == (len(p), p.shape[1] // block_size(p.shape[1]))


def test_the_second_moment_in_bf16_can_fall():
    """At beta2 = 0.999 a step changes it by a thousandth, half a unit in the last place of bf16 by two to four."""
    p = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW(lr=1e-9, beta2=0.999, moments_dtype="bfloat16")([("p.weight", p)])
    p.grad = torch.full_like(p, 1.0)
    optimizer.step()
    first = optimizer.state[p]["exp_avg_sq"].float().mean().item()
    for _ in range(500):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].float().mean().item() == pytest.approx(first * 0.999**500, rel=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_rejected_step_changes_nothing(dtype, weights):
    named = parameters(weights)
    optimizer = AdamW(lr=1e-2, moments_dtype=dtype)(named.items())
    train(named, optimizer, 3)

    def bits():
        kept = [value for p in named.values() for value in (p.detach(), *optimizer.state[p].values())]
        return [t.clone() for value in kept for t in (value.values() if isinstance(value, dict) else [value])]

    before = bits()
    for p in named.values():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(bits(), before, strict=True))


def test_chunks_do_not_show(monkeypatch):
    for dtype in ("bfloat16", "int8"):
        whole, parts = parameters(), parameters()
        train(whole, AdamW(lr=1e-2, moments_dtype=dtype)(whole.items()), 2)
        monkeypatch.setattr("pretrain.optim.compensated.CHUNK", {"cpu": 48})
        train(parts, AdamW(lr=1e-2, moments_dtype=dtype)(parts.items()), 2)
        monkeypatch.undo()
        for name, p in whole.items():
            assert torch.allclose(p, parts[name], rtol=0, atol=1e-3 if dtype == "bfloat16" else 0), name


def test_weights_of_16_bits_without_compensation_are_refused():
    with pytest.raises(UserError, match=r"^optimizer\.moments_dtype=int8 with optimizer\.compensate=false"):
        AdamW(lr=1e-2, moments_dtype="int8", compensate=False)(parameters(torch.bfloat16).items())
