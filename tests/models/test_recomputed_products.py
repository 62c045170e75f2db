"""Products that the backward computes again: the same gradients to the last bit, and fewer bytes between forward and backward."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models import recomputed_products as module
from pretrain.models.language_model import LanguageModel
from pretrain.models.recomputed_products import recomputed_products


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 1)


def tiny(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}.get(kind, {"intermediate_size": 48})
    shape |= {"num_key_value_heads": 4, "head_dim": 8} if kind == "gemma" else {}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), attn_implementation="sdpa")


def trained(kind: str, *, repeats: bool, autocast: bool, checkpointing: bool) -> list[Tensor]:
    hf = tiny(kind)
    if checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    model = LanguageModel(hf).train()
    model.repeats_products = repeats
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # of dropout
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(model(ids, ids))
        losses[-1].backward()
    return [*losses, *(p.grad for p in hf.parameters() if p.grad is not None)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "phi", "olmo2"])
def test_no_bit_changes(kind: str, autocast: bool, checkpointing: bool) -> None:
    stored, again = (
        trained(kind, repeats=repeats, autocast=autocast, checkpointing=checkpointing) for repeats in (False, True)
    )
    assert len(stored) == len(again) > 10
    assert all(torch.equal(a, b) for a, b in zip(stored, again, strict=True))


class Counted:
    """Counts the bytes of the storages that a forward keeps for its backward, those of parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.storages: dict[int, int] = {}
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(self, packed: Any) -> Any:
        storage = packed.tensor.untyped_storage() if isinstance(packed, module._Stored) else None
        if storage is not None and storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return packed


def test_a_third_of_a_llamas_activations_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 64, (2, 256), generator=torch.Generator().manual_seed(1))

    def kept_bytes() -> int:
        model = LanguageModel(tiny("llama")).train()
        counted, pack = Counted(model), module._Products.pack
        with monkeypatch.context() as patch:
            patch.setattr(module._Products, "pack", lambda self, tensor: counted.kept(pack(self, tensor)))
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, ids)
            assert loss.requires_grad
            return sum(counted.storages.values())

    less = kept_bytes()
    monkeypatch.setattr(module, "SMALLEST", 2**40)
    assert less < 0.7 * kept_bytes()


def test_a_result_that_was_changed_in_place_or_viewed() -> None:
    """The result of an operation in place has the dtype of its target; a view of a product is made of the product."""
    x = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for context in (nullcontext, recomputed_products):
        with context():
            product = x.clone().mul_(y)
            part = F.silu(product).t()[:, 1:5].t()
            loss = F.linear(part * product[1:5], weight).float().square().sum()
        found.append(torch.autograd.grad(loss, (x, y, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with recomputed_products():
        loss = (x * y).square().sum()
    (loss * 1).backward(retain_graph=True)
    once = y.grad.clone()  # type: ignore[union-attr]
    loss.backward()
    assert torch.equal(y.grad, 2 * once), "the graph runs twice"  # type: ignore[arg-type]


def with_and_without(loss_of: Any) -> list[tuple[Tensor, ...]]:
    """The gradients of ``loss_of(x, weight)`` as autograd computes them, and with repeated products."""
    found = []
    for context in (nullcontext, recomputed_products):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(4, 4, generator=generator, requires_grad=True) for _ in "xw")
        with context():
            loss = loss_of(x, weight)
        found.append(torch.autograd.grad(loss, (x, weight)))
    return found


@torch.no_grad()
def doubled(tensor: Tensor) -> None:
    tensor.mul_(2)


def of_data(tensor: Tensor) -> None:
    tensor.data.mul_(2)


@pytest.mark.parametrize("change", [doubled, of_data])
@pytest.mark.parametrize("cast", [Tensor.bfloat16, Tensor.clone], ids=["cast", "fp32"])
@pytest.mark.parametrize("result", [torch.matmul, torch.mul, lambda x, w: F.silu(x @ w)], ids=["matmul", "mul", "silu"])
def test_a_result_that_changes_between_two_uses(result: Any, cast: Any, change: Any) -> None:
    def loss_of(x: Tensor, weight: Tensor) -> Tensor:
        y = result(x, weight)
        first = cast(y)
        total = (first * first.sin()).float().sum()
        change(y)
        second = cast(y)
        return total + (second * second.sin()).float().sum() + (y * 1.5).clone().square().sum()

    expected, found = with_and_without(loss_of)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def output_changed(x: Tensor, weight: Tensor) -> Tensor:
    hidden = (x @ weight).sigmoid()
    loss = hidden.sum()
    hidden.add_(1)
    return loss + hidden.sum()


def input_changed(x: Tensor, weight: Tensor) -> Tensor:
    hidden = x @ weight
    loss = hidden.sin().sum()
    hidden.add_(1)
    return loss


def factor_changed(x: Tensor, weight: Tensor) -> Tensor:
    hidden = x @ weight
    loss = (hidden * x).bfloat16().sin().float().sum()
    doubled(hidden)
    return loss


def parameter_changed(x: Tensor, weight: Tensor) -> Tensor:
    loss = (x @ weight).sum()
    doubled(weight)
    return loss


@pytest.mark.parametrize("loss_of", [output_changed, input_changed, factor_changed, parameter_changed])
@pytest.mark.parametrize("smallest", [1, 2**18], ids=["any size", "small"])
def test_what_the_backward_needs_must_not_change(loss_of: Any, smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", smallest)
    x, weight = (torch.randn(4, 4, requires_grad=True) for _ in "xw")
    for context in (nullcontext, recomputed_products):
        with context():
            loss = loss_of(x, weight)
        says = (
            r"modified by an inplace operation: \[torch.FloatTensor \[4, 4\]\].* is at version \d+; expected version \d"
        )
        with pytest.raises(RuntimeError, match=says):
            loss.backward()


class Mark:
    """An object in a graph, whose end shows that of the graph."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Mark) -> Tensor:
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@pytest.mark.parametrize("backward", [False, True])
def test_no_tensor_keeps_its_own_graph_alive(backward: bool) -> None:
    mark = Mark()
    alive = weakref.ref(mark)
    with recomputed_products():
        x = Marked.apply(torch.randn(8, 8, requires_grad=True), mark)
        product = x * x.tanh()
        softmax = torch.softmax(product, 1)
        loss = (softmax.bfloat16() @ product.bfloat16() * softmax.exp() * product).sum()
    if backward:
        loss.backward()
    del mark, x, product, softmax, loss
    assert alive() is None


def test_where_it_is_not_used() -> None:
    """Compiled models, forwards without gradients and other devices store what autograd stores."""
    model = LanguageModel(tiny("llama"))
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert not isinstance(model._lean(ids), nullcontext)
    with torch.no_grad():
        assert isinstance(model._lean(ids), nullcontext)
    assert isinstance(model._lean(ids.to("meta")), nullcontext)
    model.is_compiled = True
    assert isinstance(model._lean(ids), nullcontext)
