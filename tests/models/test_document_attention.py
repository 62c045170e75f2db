"""Documents one after the other equal documents under a mask, and take no memory of S × S."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.models import document_attention
from pretrain.models.language_model import LanguageModel
from tests.models import architectures
from tests.models.tiny import tiny

LONG = 16_384


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def passed(model: LanguageModel, positions: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    ids = torch.randint(97, (len(positions), positions.shape[1] + 1), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(ids[:, :-1], ids[:, 1:], positions)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(tiny(request.param, max_position_embeddings=4096))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=6), min_size=2, max_size=2))
def test_documents_of_any_lengths_equal_those_under_a_mask(model: LanguageModel, rows: list[list[int]]) -> None:
    size = max(map(sum, rows))
    positions = torch.stack([positions_of([*row, size - sum(row)]) for row in rows])
    want, wanted = passed(model, positions)
    assert model.long_document_mask is document_attention.by_documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_attention, "LONG", 0)
        found, gradients = passed(model, positions)
    assert found == pytest.approx(want, rel=1e-5)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item() + 1e-6)


def test_no_tensor_grows_with_the_square_of_a_long_row() -> None:
    """Also where checkpointing computes attention again in the backward."""
    hf = tiny("llama", num_hidden_layers=1, max_position_embeddings=LONG)
    hf.activation_checkpointing_enable({"use_reentrant": False})
    model = LanguageModel(hf)
    positions = positions_of([500] * 32 + [LONG - 500 * 32])[None]
    with Largest() as seen:
        passed(model, positions)
    assert seen.elements <= LONG * 97  # the logits
    with Largest() as seen:
        passed(model, positions[:, :2048])
    assert seen.elements == 2048**2  # the mask of a shorter row, so that this test would notice one


@pytest.mark.parametrize("name", ["mistral", "gemma2", "llama4_text", "cohere2", "gpt_oss", "mamba"])
def test_other_attention_keeps_its_own_way(name: str) -> None:
    """Windows, soft caps, chunks, attention sinks, and no attention at all."""
    changes = {} if name == "mamba" else {"max_position_embeddings": 4096}
    assert LanguageModel(architectures.tiny(name, **changes)).long_document_mask is None


def test_short_rows_are_as_before() -> None:
    """To the last bit: what a run of an earlier version computed is computed again."""
    positions = torch.stack([positions_of([7, 20, 5])] * 2)
    few, many = (LanguageModel(tiny("llama", max_position_embeddings=n)) for n in (64, 4096))
    assert few.long_document_mask is None
    one, two = passed(few, positions), passed(many, positions)
    assert one[0] == two[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))
