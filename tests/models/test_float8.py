"""Products in 8-bit floating point, emulated: names, what is converted, and the numbers."""

import pytest
import torch
from tiny import tiny
from torch import nn

from pretrain.models.language_model import LanguageModel
from pretrain.models.transforms.apply import apply_transforms
from pretrain.models.transforms.float8 import Float8, convertible
from pretrain.runtime.errors import UserError

IDS = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(0))


def test_without_a_gpu_or_layers_that_fit(monkeypatch):
    monkeypatch.setattr("pretrain.models.transforms.float8.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^transform=\[float8\] needs a GPU with 8-bit floating point"):
        Float8().apply(tiny("llama"))
    with pytest.raises(UserError, match=r"^transform=\[float8\]: GPT2LMHeadModel has no linear layer in its blocks"):
        Float8(emulate=True).apply(tiny("gpt2"))
    monkeypatch.setattr("pretrain.models.transforms.float8.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'pretrain\[float8\]'"):
        Float8(emulate=True).apply(tiny("llama"))
    assert Float8().needs_compile
    assert not Float8(emulate=True).needs_compile


def test_what_is_converted():
    names = convertible(tiny("llama", intermediate_size=48))
    assert names == {
        f"model.layers.{i}.{part}"
        for i in range(2)
        for part in (*(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert not any("mlp" in name for name in convertible(tiny("llama", intermediate_size=50)))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_names_and_numbers(recipe):
    """Gradients in 8 bits point where those in fp32 do, and evaluation is not rounded at all."""
    pytest.importorskip("torchao")
    plain, hf = tiny("llama"), tiny("llama")
    before, parameters = list(hf.state_dict()), {name: id(p) for name, p in hf.named_parameters()}
    apply_transforms((Float8(recipe, emulate=True),), hf, seed=0)
    assert list(hf.state_dict()) == before
    assert {name: id(p) for name, p in hf.named_parameters()} == parameters
    assert all(isinstance(module, nn.Linear) for module in hf.modules() if hasattr(module, "in_features"))
    ours, exact = LanguageModel(hf), LanguageModel(plain)
    assert ours.fused_loss
    assert ours.document_mask is not None, "the probes are not disturbed by scales that all tokens share"
    losses = [model(IDS[:, :-1], IDS[:, 1:]) for model in (ours, exact)]
    assert losses[0] != losses[1]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(hf.named_parameters(), plain.parameters(), strict=True):
        assert float(torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)) > 0.99, name
    with torch.no_grad():
        ours.eval(), exact.eval()
        assert ours(IDS[:, :-1], IDS[:, 1:]) == exact(IDS[:, :-1], IDS[:, 1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_compiled_on_a_gpu(recipe):
    """200 steps on one batch: the loss falls as in bf16, to 2 %."""
    pytest.importorskip("torchao")
    ids, found = torch.randint(97, (8, 65), device="cuda"), []
    for transforms in ((), (Float8(recipe),)):
        hf = tiny("llama", hidden_size=128, intermediate_size=256).cuda()
        apply_transforms(transforms, hf, seed=0)
        model = LanguageModel(hf, compile=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for _ in range(200):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=0.02, abs=0.02)
