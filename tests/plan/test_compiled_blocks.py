"""What a compiled model keeps, without compiling it."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pretrain.models.blocks import find_blocks
from pretrain.plan.compiled_blocks import partition_blocks
from pretrain.plan.storages import StorageTracker
from tests.conftest import SHAPES

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


def step(hf, ids):
    """Return the loss, the gradients, and the bytes that exist between forward and backward."""
    hf.zero_grad()
    with StorageTracker() as tracker:
        loss = hf(input_ids=ids, labels=ids, use_cache=False).loss
        tracker.phase = "backward"
        kept = sum(tracker.usage()["setup"].end.values())
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in hf.named_parameters()}, kept


def test_the_graphs_compute_the_same_and_keep_less():
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["llama"], vocab_size=64)).train()
    ids = torch.randint(0, 64, (4, 128))
    loss, gradients, kept = step(hf, ids)
    blocks = find_blocks(hf)
    assert len(blocks) == 3
    partition_blocks(blocks)
    again, same, fewer = step(hf, ids)
    assert again == pytest.approx(loss)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, same[name], atol=1e-6), name
    assert fewer < 0.9 * kept
    hf.gradient_checkpointing_enable({"use_reentrant": False})
    again, same, fewest = step(hf, ids)
    assert again == pytest.approx(loss)
    assert all(torch.allclose(gradient, same[name], atol=1e-6) for name, gradient in gradients.items())
    assert fewest < 0.6 * kept, "the inputs of the blocks"
    with torch.no_grad():
        assert hf(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss)


@pytest.mark.slow
def test_a_compiled_step_needs_what_was_planned(tmp_path):
    from bench_plan import ROWS, measured, predicted, words_of

    model, processes, words = next(row for row in ROWS if row[0] == "llama" and "model.compile=true" in row[2])
    words = words_of(model, words, str(tmp_path / "run"))
    assert predicted(words, processes) == pytest.approx(measured(words, processes, tmp_path), rel=0.05)
