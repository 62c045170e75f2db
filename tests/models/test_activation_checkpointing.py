"""Recomputed and offloaded activations: the same numbers to the last bit, with less memory."""

import pytest
import torch
from tiny import CONFIGS, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from pretrain.models import activation_checkpointing
from pretrain.models.activation_checkpointing import HostActivations, blocks, checkpoint_activations, is_weight
from pretrain.models.language_model import LanguageModel
from pretrain.runtime.errors import UserError
from tests.memory import TracedMemory

CHOICES = (False, "selective", 2, True)  # from the most to the least memory
IDS = torch.randint(97, (2, 49), generator=torch.Generator().manual_seed(0))


def forward_and_backward(hf):
    """Loss, gradients by name, and the bytes that are live between forward and backward."""
    model = LanguageModel(hf)
    torch.manual_seed(3)  # of dropout
    with TracedMemory() as memory:
        loss = model(IDS[:, :-1], IDS[:, 1:])
        saved = memory.live
        loss.backward()
    return loss.item(), {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}, saved


@pytest.mark.parametrize(
    "name", [n if n in ("llama", "gpt2", "gemma2") else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS]
)
def test_the_same_bits_with_less_memory(name):
    changes = {"n_layer": 4} if name == "bloom" else {"num_hidden_layers": 4}
    if name == "gpt2":
        changes |= {"resid_pdrop": 0.1, "attn_pdrop": 0.1}
    found = {}
    for choice in CHOICES:
        hf = tiny(name, **changes)
        before = list(hf.state_dict())
        checkpoint_activations(hf, choice)
        assert list(hf.state_dict()) == before
        found[choice] = forward_and_backward(hf)
    loss, grads, _ = found[False]
    for choice in CHOICES[1:]:
        assert found[choice][0] == loss
        assert found[choice][1].keys() == grads.keys()
        assert all(torch.equal(found[choice][1][n], g) for n, g in grads.items()), choice
    saved = {choice: found[choice][2] for choice in CHOICES}
    assert saved[False] > max(saved["selective"], saved[2])
    assert min(saved["selective"], saved[2]) > saved[True]
    if name == "llama":
        assert sorted(saved.values(), reverse=True) == [saved[choice] for choice in CHOICES]


def test_every_nth_block():
    hf = tiny("llama", num_hidden_layers=5)
    checkpoint_activations(hf, 3)
    assert [block.gradient_checkpointing for block in blocks(hf)] == [True, False, False, True, False]


def test_an_architecture_without_support(monkeypatch):
    config = AutoConfig.for_model("openai-gpt", vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    hf = AutoModelForCausalLM.from_config(config)
    for choice in ("true", "selective", "2"):
        value = {"true": True, "2": 2}.get(choice, choice)
        with pytest.raises(
            UserError, match=rf"^model\.gradient_checkpointing={choice}: OpenAIGPTLMHeadModel can't rec"
        ):
            checkpoint_activations(hf, value)
    monkeypatch.setattr(activation_checkpointing, "blocks", lambda hf: [])  # of one that counts no blocks
    with pytest.raises(
        UserError, match=r"^model\.gradient_checkpointing=2: the blocks of LlamaForCausalLM can't be swit"
    ):
        checkpoint_activations(tiny("llama"), 2)


@pytest.mark.parametrize("choice", [False, True, "selective"])
def test_offloaded_activations_are_the_same(choice):
    """On a CPU nothing is copied, so the copies are made here for all that is no weight."""
    loss, grads, _ = forward_and_backward(tiny("llama"))
    hf, copied = tiny("llama"), []

    class Everything(HostActivations):
        def is_copied(self, tensor):
            assert not super().is_copied(tensor)
            if not is_weight(tensor):
                copied.append(tuple(tensor.shape))
            return not is_weight(tensor)

    checkpoint_activations(hf, choice)
    Everything().attach(hf.base_model)
    assert forward_and_backward(hf)[0] == loss
    assert all(torch.equal(p.grad, grads[name]) for name, p in hf.named_parameters())
    assert copied.count((2, 48, 32)) >= 2, "the input of each block"
    filled = [shape for shape in copied if 0 not in shape]  # torch 2.10 saves two empty ones for a recomputed block
    assert len(filled) > 40 if choice is False else len(filled) < 10
    shapes = {tuple(p.shape) for p in hf.parameters()}
    assert not {*copied} & (shapes | {shape[::-1] for shape in shapes}), "no weights, nor transposed views of them"


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.10 saves such copies without a graph")
def test_what_autocast_makes_of_weights_is_not_offloaded():
    hf, copied = tiny("llama"), []

    class Recorded(HostActivations):
        def is_copied(self, tensor):
            if not is_weight(tensor):
                copied.append(tuple(tensor.shape))
            return not is_weight(tensor)

    Recorded().attach(hf.base_model)
    with torch.autocast("cpu", torch.bfloat16):
        LanguageModel(hf)(IDS[:, :-1], IDS[:, 1:]).backward()
    assert len(copied) > 40
    assert copied.count((96, 32)) >= 2, "the inputs of matrix products, one row per token"
    shapes = {tuple(p.shape) for p in hf.parameters()}
    assert not {*copied} & (shapes | {shape[::-1] for shape in shapes}), (
        "no weights in bf16, nor transposed views of them"
    )


def test_offload_leaves_no_hooks_behind_after_an_error():
    hf = tiny("llama")
    HostActivations().attach(hf.base_model)
    with pytest.raises(IndexError):
        hf(torch.full((1, 4), 1000))
    assert forward_and_backward(hf)[0] == forward_and_backward(tiny("llama"))[0]
    x = torch.ones(3, requires_grad=True)
    assert (x * x).grad_fn._raw_saved_self.data is not None


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("choice", [True, "selective", 2])
@pytest.mark.slow
def test_compiled(name, choice):
    """Compiled after checkpointing is set: the same loss as without, to rounding."""
    want, grads, _ = forward_and_backward(tiny(name))
    hf = tiny(name)
    checkpoint_activations(hf, choice)
    model = LanguageModel(hf, compile=True)
    loss = model(IDS[:, :-1], IDS[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    for name_, p in hf.named_parameters():
        assert torch.allclose(p.grad, grads[name_], rtol=1e-4, atol=1e-4), name_


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", [False, True])
def test_offload_on_a_gpu(choice):
    """The same loss and gradients, less memory between forward and backward, and no wait of the host."""
    ids = torch.randint(97, (8, 65), device="cuda")
    found = {}
    for offload in (False, True):
        hf = tiny("llama", hidden_size=256, num_hidden_layers=8).cuda()
        checkpoint_activations(hf, choice)
        if offload:
            HostActivations().attach(hf.base_model)
        model = LanguageModel(hf)
        model(ids[:, :-1], ids[:, 1:]).backward()  # of libraries that are initialised
        hf.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")  # raises where the host waits for the device
        loss = model(ids[:, :-1], ids[:, 1:])
        torch.cuda.set_sync_debug_mode("default")
        saved = torch.cuda.memory_allocated() - before
        loss.backward()
        found[offload] = loss.item(), {n: p.grad for n, p in hf.named_parameters()}, saved
    assert found[True][0] == found[False][0]
    assert all(torch.equal(found[True][1][n], g) for n, g in found[False][1].items())
    assert found[True][2] < 0.5 * found[False][2]
