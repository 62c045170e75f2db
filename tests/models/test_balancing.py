"""The load balancing loss of mixtures of experts: added where the config asks for it, as transformers adds it."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny

from pretrain.data.batch import IGNORE, Batch
from pretrain.distributed.context import DistributedContext
from pretrain.models import document_attention
from pretrain.models.language_model import LanguageModel
from pretrain.runtime.errors import UserError
from pretrain.strategy.engine import Engine
from tests.strategy.test_precision import load

COEFFICIENT = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
NAMES = ["mixtral", "qwen3_moe", "olmoe", "granitemoe"]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 97, (4, 25), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, 3:6] = IGNORE
    return ids[:, :-1].contiguous(), labels


def gradients(hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in hf.named_parameters() if p.grad is not None}
    hf.zero_grad()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers_own_loss(name: str) -> None:
    hf = tiny(name, **COEFFICIENT)
    ids, labels = batch()
    targets = (labels != IGNORE).sum()
    longer = torch.cat([torch.full((4, 1), IGNORE), labels], 1)
    out = hf(input_ids=torch.cat([ids, ids[:, -1:]], 1), labels=longer, use_cache=False)
    assert out.aux_loss.item() > 0
    # transformers routes the last column, which has no target, too: without it the aux loss is of other tokens
    row = hf(input_ids=ids, use_cache=False)
    cross_entropy = torch.nn.functional.cross_entropy(row.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (cross_entropy + targets * 0.5 * row.aux_loss).backward()
    wanted = gradients(hf)
    assert (out.loss - 0.5 * out.aux_loss).item() == pytest.approx((cross_entropy / targets).item(), rel=1e-4)

    model = LanguageModel(hf)
    loss = model(ids, labels)
    loss.backward()
    found = gradients(hf)
    assert loss.item() == pytest.approx(cross_entropy.item(), rel=1e-5), "records stay cross entropy"
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert torch.allclose(found[key], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max()))), key

    model(ids, labels, None, torch.full((4,), 2.0)).backward()
    for key, gradient in gradients(hf).items():
        assert torch.allclose(gradient, 2 * wanted[key], atol=2e-5 * max(1.0, float(gradient.abs().max()))), key

    plain = LanguageModel(tiny(name))
    plain(ids, labels).backward()
    router = next(key for key in wanted if "gate.weight" in key or "router" in key)
    assert not torch.allclose(gradients(plain.hf)[router], wanted[router], atol=1e-4), "the test would notice"
    assert model.eval()(ids, labels).item() == pytest.approx(cross_entropy.item(), rel=1e-5)


def test_micro_batches_count_by_their_targets() -> None:
    """Two micro-batches of a step: the mean of their balancing losses, weighted by targets."""
    ids, labels = batch()
    labels[2:, 10:] = IGNORE
    counts = [int((part != IGNORE).sum()) for part in labels.split(2)]
    hf = tiny("mixtral", **COEFFICIENT)
    losses = [hf(input_ids=part, use_cache=False) for part in ids.split(2)]
    total = sum(
        (
            torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), part.flatten(), reduction="sum")
            + n * 0.5 * out.aux_loss
        )
        / sum(counts)
        for out, part, n in zip(losses, labels.split(2), counts, strict=True)
    )
    assert isinstance(total, torch.Tensor)
    total.backward()
    wanted = gradients(hf)
    model = LanguageModel(hf)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters()),
        precision=load("32-true"),
        world=DistributedContext(),
    )
    for part, target in zip(ids.split(2), labels.split(2), strict=True):
        engine.backward(Batch(part, target, None, 0), tokens=sum(counts), last=True)
    found = gradients(hf)
    assert all(torch.allclose(found[key], gradient, atol=1e-6) for key, gradient in wanted.items())


def test_not_asked_for_not_added() -> None:
    assert LanguageModel(tiny("mixtral", router_aux_loss_coef=0.5)).balancing == 0
    assert LanguageModel(tiny("mixtral", output_router_logits=True, router_aux_loss_coef=0.0)).balancing == 0
    assert LanguageModel(tiny("mixtral", **COEFFICIENT)).balancing == 0.5


def test_with_masks_of_documents_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    model = LanguageModel(tiny("gpt_oss", **COEFFICIENT))
    ids, labels = batch()
    with pytest.raises(UserError, match="output_router_logits: false"):
        model(ids, labels, torch.arange(24).remainder(8).expand(4, -1))


def test_an_architecture_without_one_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert LanguageModel(tiny("deepseek_v3", **COEFFICIENT)).balancing == 0
    assert "has no load balancing loss" in capsys.readouterr().err


def test_documents_in_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal those in rows that are short enough for a mask."""
    hf = tiny("mixtral", max_position_embeddings=4096, **COEFFICIENT)
    ids, labels = batch()
    positions = torch.arange(24).remainder(7).expand(4, -1).contiguous()
    model = LanguageModel(hf)
    model(ids, labels, positions).backward()
    wanted = gradients(hf)
    monkeypatch.setattr(document_attention, "LONG", 0)
    model(ids, labels, positions).backward()
    for key, gradient in gradients(hf).items():
        assert torch.equal(gradient, wanted[key]), key
