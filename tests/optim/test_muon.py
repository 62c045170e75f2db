"""Muon: which weights it updates, that it equals torch's, and what it does with 16 bits and rejected steps."""

import pytest
import torch
from torch import nn

from pretrain.optim.muon import Muon, split
from pretrain.optim.orthogonalized import OrthogonalizedMomentum, orthogonalized
from pretrain.runtime.errors import UserError
from tests.models.tiny import CONFIGS, tiny

SPEC = Muon(lr=1e-2, adamw_lr=1e-3)


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.up.weight": (24, 16), "model.layers.1.down.weight": (16, 24)}
    return {
        name: nn.Parameter((torch.randn(s, generator=generator) * 0.02).bfloat16().to(dtype))
        for name, s in shapes.items()
    }


def train(named, optimizer, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        optimizer.step()
    return named


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_of_the_blocks_and_nothing_else(name):
    hf = tiny(name)
    matrices, others = split(hf.named_parameters())
    ends = [m.weight for m in (hf.get_input_embeddings(), hf.get_output_embeddings())]
    assert not any(p is end for _, p in matrices for end in ends)
    assert {id(p) for _, p in (*matrices, *others)} == {id(p) for p in hf.parameters()}
    # The matrices beside the blocks that are neither embedding nor head are positions and OPT's projections.
    left = {n for n, p in others if p.ndim > 1 and not any(p is end for end in ends)}
    assert all("position" in n or "wpe" in n or "project" in n for n in left), left
    assert all(p.ndim == 1 for n, p in others if "layers." in n or ".h." in n)


@pytest.mark.parametrize("scale", ["adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_equals_torchs(scale, nesterov):
    ours, theirs = weights(), weights()
    settings = {"lr": 1e-2, "weight_decay": 0.1, "nesterov": nesterov}
    train(ours, OrthogonalizedMomentum(ours.values(), scale=scale, **settings), 4)
    name = {"adamw": "match_rms_adamw"}.get(scale, scale)
    train(theirs, torch.optim.Muon(theirs.values(), adjust_lr_fn=name, **settings), 4)
    for key, p in ours.items():
        moved = (theirs[key] - weights()[key]).detach().norm()
        assert float((p - theirs[key]).detach().norm() / moved) < 1e-2, "rounding of bf16 in the iteration"


def test_singular_values_are_about_one_and_stacks_are_iterated_one_by_one():
    stack = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(stack, 5)
    assert torch.linalg.svdvals(found.float()).sub(1).abs().max() < 0.4
    for one, whole in zip(stack, found, strict=True):
        assert torch.allclose(orthogonalized(one, 5).float(), whole.float(), atol=0.05)


def test_small_updates_reach_weights_of_16_bits():
    exact, ours = weights(), weights(torch.bfloat16)
    both = [OrthogonalizedMomentum(named.values(), lr=1e-5, weight_decay=0.1) for named in (exact, ours)]
    for named, optimizer in zip((exact, ours), both, strict=True):
        train(named, optimizer, 200)
    for key, p in ours.items():
        moved = (exact[key] - weights()[key]).detach().norm()
        whole = p.float() + both[1].state[p]["compensation"].float()
        assert float((whole - exact[key]).detach().norm() / moved) < 0.2


def test_a_rejected_step_changes_nothing():
    named = weights()
    optimizer = OrthogonalizedMomentum(named.values(), lr=1e-2)
    train(named, optimizer, 1)
    before = [p.detach().clone() for p in named.values()]
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in named.values()]
    for p in named.values():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(named.values(), before, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["momentum_buffer"], b) for p, b in zip(named.values(), buffers, strict=True)
    )


def test_without_matrices_to_train():
    with pytest.raises(UserError, match=r"^optimizer=muon: no matrix of the model's blocks is trained"):
        SPEC({"embed.weight": nn.Parameter(torch.ones(3, 2))}.items())
    (muon,) = SPEC(weights().items())
    assert muon.param_groups[0]["lr"] == 1e-2


def test_rates_of_the_two():
    made = SPEC([*weights().items(), ("lm_head.weight", nn.Parameter(torch.ones(4, 16)))])
    assert [group["lr"] for optimizer in made for group in optimizer.param_groups] == [1e-2, 1e-3]


def test_the_base_of_unknown_origin(capsys):
    SPEC.check_base("my/model")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "it is not known which optimizer my/model was trained with" in said
    assert "arXiv:2605.10468" in said
