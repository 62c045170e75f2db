"""KL(base ‖ now): against a computation from full logits, for every way a model may be evaluated."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.batch import IGNORE, Batch
from pretrain.evaluation.base_states import BaseStates
from pretrain.models import kl_divergence as kl
from pretrain.models.kl_divergence import Head
from pretrain.models.logits_map import LogitsMap
from tests.engines import IDS, engine_of, trained

LABELS = IDS[:, 1:].clone()
LABELS[0, :5] = IGNORE
BATCH = Batch(IDS[:, :-1], LABELS, None, 27)


class Domain:
    name = "text"
    batches = type("Batches", (list,), {"batch_size": 2, "sequence_length": 16})([BATCH, BATCH])


def plain_kl(base, now):
    """The sum over targets, from the logits of both models in fp64."""
    p, q = (torch.log_softmax(hf(input_ids=BATCH.input_ids, use_cache=False).logits.double(), -1) for hf in (base, now))
    return (((p.exp() * (p - q)).sum(-1)) * (LABELS != IGNORE)).sum()


def summed_of(states, engine, index):
    return states.evaluate(engine, BATCH, ("text", index))[0]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "cohere", "granite"]
)  # tied, untied; capped, scaled logits
@torch.no_grad()
def test_equals_the_divergence_of_full_logits(name):
    engine = engine_of(name)
    engine.model.eval()
    base = copy.deepcopy(engine.model.hf)
    states = BaseStates(tokens=32)
    states.capture(engine, [Domain])
    assert summed_of(states, engine, 0)[1:].tolist() == [0, 27], "the base model itself"
    with torch.enable_grad():
        trained(engine.model.train() and engine)
    engine.model.eval()
    nats, summed, counted = summed_of(states, engine, 0)
    assert counted == 27
    assert nats == engine.evaluate(BATCH), "the loss does not change by what is measured beside it"
    assert summed == pytest.approx(float(plain_kl(base, engine.model.hf)), rel=1e-4, abs=2e-6)
    assert summed > 0.002
    assert summed_of(states, engine, 1).tolist() == [nats, 0, 0], "beyond the tokens it is measured on"


@given(rows=st.integers(1, 9), chunk=st.integers(1, 9), bias=st.booleans(), seed=st.integers(0, 99))
def test_chunks_do_not_matter(rows, chunk, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(rows, 4, generator=generator) for _ in range(2)]
    heads = [Head(torch.randn(11, 4, generator=generator), torch.randn(11, generator=generator) if bias else None)] * 2
    labels = torch.randint(IGNORE, IGNORE + 2, (rows,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kl, "chunk_rows", lambda rows, vocabulary: chunk)
        found = kl.kl_divergence(hidden[0], heads[0], hidden[1], heads[1], labels)
    logits = [torch.nn.functional.linear(h, *heads[0]).double() for h in hidden]
    p, q = (torch.log_softmax(z, 1) for z in logits)
    assert found == pytest.approx(float(((p.exp() * (p - q)).sum(1) * (labels != IGNORE)).sum()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "logits_map", [LogitsMap(scale=0.5), LogitsMap(cap=2.0), LogitsMap(scale=3.0, cap=1.5)], ids=range(3)
)
def test_scaled_and_capped_logits(logits_map):
    """Value and gradients of the chunked computation against autograd on all logits, where the cap is far from linear."""
    generator = torch.Generator().manual_seed(0)
    base, now, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (9, 4), (11, 4), (11,)))
    labels = torch.arange(9).where(torch.arange(9) != 2, IGNORE)
    leaves = [tensor.requires_grad_() for tensor in (now, weight, bias)]

    def logits(hidden):
        z = torch.nn.functional.linear(hidden, weight, bias) * logits_map.scale
        return z if logits_map.cap is None else logits_map.cap * torch.tanh(z / logits_map.cap)

    with torch.no_grad():
        p = torch.log_softmax(logits(base) / 2, 1)
    wanted = (((p.exp() * (p - torch.log_softmax(logits(now) / 2, 1))).sum(1)) * (labels != IGNORE)).sum()
    gradients = torch.autograd.grad(wanted, leaves)
    head = Head(weight, bias)
    found = kl.kl_divergence(base, head, now, head, labels, temperature=2.0, logits_map=logits_map)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_evaluation_before_the_first_step_keeps_the_states():
    """The same as those of a forward of their own, with the same loss."""
    engine = engine_of()
    engine.model.eval()
    captured, kept = BaseStates(tokens=32), BaseStates(tokens=32)
    captured.capture(engine, [Domain])
    (nats, kl, counted), _ = kept.evaluate(engine, BATCH, ("text", 0), keep=True)
    assert (nats, kl, counted) == (engine.evaluate(BATCH), 0, 27)
    assert captured._hidden.keys() == kept._hidden.keys()
    assert torch.equal(captured._hidden["text", 0], kept._hidden["text", 0])
    assert kept.evaluate(engine, BATCH, None, keep=True)[0].tolist() == [nats, 0, 0], "a dummy batch keeps nothing"
    assert len(kept._hidden) == 1


def test_a_head_that_is_no_matrix_has_none(capsys):
    engine = engine_of()
    engine.model.logits_map = None
    states = BaseStates(tokens=32)
    states.capture(engine.model.eval() and engine, [Domain])
    assert "the head of LlamaForCausalLM is not a matrix alone" in capsys.readouterr().err
    assert summed_of(states, engine, 0)[2] == 0


def test_at_least_one_batch_is_compared():
    assert [BaseStates(tokens).num_batches(Domain) for tokens in (1, 32, 63, 64, 999)] == [1, 1, 1, 2, 2]
