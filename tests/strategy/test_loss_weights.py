"""The weights of rows in the loss: a step equals the plain autograd of sum(w * nll) / sum(w) over the global batch."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from pretrain.data.batch import IGNORE, Batch
from pretrain.models.language_model import LanguageModel
from pretrain.strategy.engine import norm_of
from tests.engines import engine_of
from tests.models.tiny import tiny

IDS = torch.randint(97, (6, 17), generator=torch.Generator().manual_seed(1))
LABELS = IDS[:, 1:].clone()
LABELS[0, 3:9] = IGNORE
LABELS[4, ::2] = IGNORE
WEIGHTS = torch.tensor([2.0, 0.0, 0.25, 1.0, 3.0, 0.5])
BATCH = Batch(IDS[:, :-1], LABELS, None, int((LABELS != IGNORE).sum()), micro_batch_size=2, loss_weights=WEIGHTS)


def reference(weights):
    """The loss and the gradients by name, from transformers' own logits."""
    hf = tiny("llama")
    logits = hf(input_ids=BATCH.input_ids).logits
    labels = BATCH.labels
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none").view_as(labels)
    factors = weights[:, None] * (labels != IGNORE)
    loss = (nll * factors).sum() / factors.sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in hf.named_parameters()}


def one_step(batch, fused=True):
    """The numbers of a step, and the gradients with which it updates."""
    engine = engine_of()
    assert engine.model.fused_loss
    engine.model.fused_loss = fused
    seen = {}

    def look(*_):
        seen.update({name: p.grad.clone() for name, p in engine.model.hf_named_parameters()})

    engine.optimizer.register_step_pre_hook(look)
    return engine.train_step(batch), seen


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_a_step_is_plain_autograd(size, fused):
    want, gradients = reference(WEIGHTS)
    out, found = one_step(replace(BATCH, micro_batch_size=size), fused)
    assert out.loss.item() == pytest.approx(want, rel=1e-6)
    assert out.loss.item() != pytest.approx(reference(torch.ones(6))[0], rel=1e-3), "the weights matter"
    assert out.tokens == BATCH.num_targets, "tokens stay unweighted"
    assert out.grad_norm.item() == pytest.approx(norm_of(_as_parameters(gradients)).item(), rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def _as_parameters(gradients):
    made = []
    for gradient in gradients.values():
        made.append(torch.nn.Parameter(torch.zeros_like(gradient)))
        made[-1].grad = gradient
    return made


def test_a_part_of_weight_0_is_not_learned():
    """Its rows change neither the loss nor the gradients, whatever they are."""
    out, found = one_step(BATCH)
    other = replace(BATCH, input_ids=BATCH.input_ids.clone(), labels=BATCH.labels.clone())
    other.input_ids[1], other.labels[1] = 5, 7
    again, same = one_step(other)
    assert again.loss.item() == out.loss.item()
    assert all(torch.equal(same[name], found[name]) for name in found)


def test_only_the_ratio_of_weights_matters():
    out, found = one_step(BATCH)
    scaled, same = one_step(replace(BATCH, loss_weights=WEIGHTS * 4))
    assert scaled.loss.item() == pytest.approx(out.loss.item(), rel=1e-6)
    assert all(torch.allclose(same[name], found[name], atol=1e-7) for name in found)


def test_equal_weights_are_no_weights_to_the_bit():
    out, found = one_step(replace(BATCH, loss_weights=None))
    ones, same = one_step(replace(BATCH, loss_weights=torch.ones(6)))
    assert ones.loss.item() == out.loss.item()
    assert all(torch.equal(same[name], found[name]) for name in found)


def test_a_batch_in_which_nothing_counts_has_no_gradient():
    out, found = one_step(replace(BATCH, loss_weights=torch.zeros(6)))
    assert (out.loss.item(), out.grad_norm.item()) == (0.0, 0.0)
    assert all(not gradient.count_nonzero() for gradient in found.values())


def test_micro_batches_carry_the_weights_of_their_rows():
    found = [part.loss_weights.tolist() for part in BATCH.micro_batches()]
    assert found == [[2.0, 0.0], [0.25, 1.0], [3.0, 0.5]]
    assert BATCH.to(torch.device("meta")).loss_weights.device.type == "meta"
    assert BATCH.sum_of_weights == 2 * 10 + 0.25 * 16 + 1 * 16 + 3 * 8 + 0.5 * 16


@pytest.mark.slow
def test_the_compiled_loss_takes_weights():
    hf = tiny("llama")
    model = LanguageModel(hf)
    plain = model(BATCH.input_ids, BATCH.labels, None, WEIGHTS)
    eager = torch.compile(model._loss, backend="eager", dynamic=False)
    assert eager(BATCH.input_ids, BATCH.labels, None, WEIGHTS).item() == pytest.approx(plain.item(), rel=1e-6)
