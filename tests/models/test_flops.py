"""The formula against torch's own count of the operations of the loss, forward and backward, for every model it is given for."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.flops import COUNTED, flops_per_token
from pretrain.models.language_model import LanguageModel
from tests.models.tiny import CONFIGS, tiny

ROWS, LENGTH = 2, 16


def counted(model, *, train: bool) -> float:
    """Operations a token. Eager attention is made of products that the counter sees, every one of the length²."""
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        loss = model(ids, ids)
        if train:
            loss.backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("name", [*sorted(COUNTED & CONFIGS.keys()), "llama-tied-biased"])
def test_equals_what_is_counted(name):
    hf = tiny(name, attention="eager")
    found = flops_per_token(hf, LENGTH)
    model = LanguageModel(hf)
    assert found.full == pytest.approx(counted(model, train=True), rel=1e-3)
    assert found.full / 3 == pytest.approx(counted(model, train=False), rel=1e-3)
    attention = 12 * 2 * 32 * LENGTH  # layers, width
    assert found.full - found.causal == attention / 2


def test_every_counted_model_is_tried():
    assert CONFIGS.keys() >= COUNTED


def test_a_model_that_is_not_counted_has_a_reason_and_no_number():
    found = flops_per_token(tiny("mixtral"), LENGTH)
    assert (found.causal, found.full) == (None, None)
    assert "mixtral" in found.facts()["flops_unknown"]


def test_a_window_smaller_than_the_sequence():
    mistral = tiny("mistral")  # its window: 16
    assert flops_per_token(mistral, 16).causal is not None
    assert flops_per_token(mistral, 17).facts() == {
        "flops_per_token": None,
        "flops_per_token_full_attention": None,
        "flops_unknown": "its attention sees 16 of the 17 tokens of a sequence",
    }
