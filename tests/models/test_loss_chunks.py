"""Chunks of the cross entropy: by hand, as they are compiled, and their gradients in 16 bits; with rows without a target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pretrain.data.batch import IGNORE
from pretrain.models import loss as module
from pretrain.models.loss import FP16_GRAD_SCALE, linear_cross_entropy

ROWS, HIDDEN, VOCABULARY = 48, 16, 40


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight, bias and labels, of which some rows of every chunk, and one whole chunk, have no target."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(ROWS, HIDDEN, generator=draw), torch.randn(VOCABULARY, HIDDEN, generator=draw) / 4
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=draw)
    labels[3:6], labels[20], labels[32:40] = IGNORE, IGNORE, IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randn(VOCABULARY, generator=draw), labels


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor]:
    loss = F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=IGNORE, reduction="sum")
    return loss.item(), *torch.autograd.grad(loss, [hidden, weight])


@pytest.fixture(autouse=True)
def chunks_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 8 * VOCABULARY)
    assert module.chunk_rows(ROWS, VOCABULARY) == 8


@pytest.mark.parametrize("chunk", [module._eager_chunk, module._traced_chunk])
def test_a_chunk_by_hand(chunk: Any) -> None:
    """Two rows, of which one has no target: the loss is -log softmax of the other's, the gradient p - one-hot, and 0."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, -3.0, 0.5]])
    p = torch.tensor([0.09003057, 0.24472848, 0.66524094])
    loss, grad, *_ = chunk(logits.clone(), torch.tensor([1, IGNORE]))
    assert loss.item() == pytest.approx(1.40760597, rel=1e-6)
    assert torch.allclose(grad[0], p - torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)
    assert torch.equal(grad[1], torch.zeros(3))


def test_what_is_compiled_leaves_them_out_too() -> None:
    """Traced as `torch.compile` traces it, and run as it is: no compiler is needed for that."""
    hidden, weight, bias, labels = inputs()
    want, want_hidden, want_weight = reference(hidden, weight, bias, labels)
    seen: list[str] = []

    def note(graph: Any, examples: Any) -> Any:
        seen.append(graph.print_readable(print_output=False))
        return graph

    compiled = torch.compile(linear_cross_entropy, backend=note, fullgraph=True)
    loss = compiled(hidden, weight, bias, labels)
    got_hidden, got_weight = torch.autograd.grad(loss, [hidden, weight])
    assert any("logsumexp" in code for code in seen), "the traced way was taken"
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert torch.allclose(got_hidden, want_hidden, atol=1e-5)
    assert torch.allclose(got_weight, want_weight, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_chunks_gradients_are_as_large_as_they_are(dtype: torch.dtype) -> None:
    """fp16's gradients go through the products times 64: each chunk's must come down again, of hidden and of the head."""
    hidden, weight, _, labels = inputs()
    bias = torch.zeros(VOCABULARY)
    _, want_hidden, want_weight = reference(hidden, weight, bias, labels)
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden, weight, None, labels)
    got_hidden, got_weight = torch.autograd.grad(loss, [hidden, weight])
    assert FP16_GRAD_SCALE == 64
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert float((got_weight - want_weight).norm() / want_weight.norm()) < tolerance
    for rows in range(0, ROWS, 8):
        size = want_hidden[rows : rows + 8].norm()
        assert float((got_hidden[rows : rows + 8] - want_hidden[rows : rows + 8]).norm()) <= tolerance * float(size)
    only = torch.full_like(labels, IGNORE)
    only[8:16] = labels[8:16]  # the second chunk alone: what it adds to the first's nothing
    _, _, want_second = reference(hidden, weight, bias, only)
    with torch.autocast("cpu", dtype):
        (got_second,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, None, only), [weight])
    assert float(got_second.norm() / want_second.norm()) == pytest.approx(1.0, abs=tolerance)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_rows_change_no_bit(dtype: torch.dtype, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk, blocks of one row, of a few, and all rows at once have the same loss and gradients."""
    _, _, bias, labels = inputs()
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(2)).to(dtype)
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3)) if weighted else None
    found = []
    for rows in (1, 7, ROWS):
        monkeypatch.setattr(module, "block_rows", lambda _, rows=rows: rows)
        for given in (None, bias):
            mine = logits.clone()
            loss, grad, _ = module._eager_chunk(mine, labels, weights, given, 64.0)
            assert grad.data_ptr() == mine.data_ptr(), "no second tensor of this size"
            found.append((loss, grad))
    for i, (loss, grad) in enumerate(found):
        assert torch.equal(loss, found[i % 2][0])
        assert torch.equal(grad, found[i % 2][1])
    want = torch.softmax(logits.float(), 1).scatter_add(1, labels.clamp(min=0)[:, None], -torch.ones(ROWS, 1))
    want *= (labels != IGNORE)[:, None] * (1 if weights is None else weights[:, None])
    scale = 64 if dtype != torch.float32 else 1
    assert torch.allclose(found[0][1].float() / scale, want, atol=1e-6, rtol=1e-2)


def test_blocks_fit_the_cache_of_a_cpu() -> None:
    assert module.block_rows(torch.empty(4096, 2**15, device="meta")) == 4096, "all rows at once elsewhere"
    assert module.block_rows(torch.empty(1).expand(4096, 2**15)) == max(32, torch.get_num_threads())
    assert module.block_rows(torch.empty(1).expand(8, 2**30)) == torch.get_num_threads()
