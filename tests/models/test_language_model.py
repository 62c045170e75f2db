from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, NOT_LINEAR, tiny
from torch.nn import functional as F

from pretrain.data.batch import IGNORE
from pretrain.distributed.sharding import TensorFiles, TensorShard, write
from pretrain.models.language_model import LanguageModel
from pretrain.models.logits_map import LogitsMap
from pretrain.models.probe import by_masks, by_positions, has_plain_head
from pretrain.runtime.errors import UserError


def batch(rows: int = 2, length: int = 24, vocabulary: int = 97) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, 3:6] = IGNORE
    return ids[:, :-1].contiguous(), labels


def grads(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(hf: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' own loss (labels given unshifted, so a column is added in front) × its number of targets."""
    hf.zero_grad()
    shifted = torch.cat([torch.full((len(labels), 1), IGNORE), labels], 1)
    longer = torch.cat([ids, ids[:, -1:]], 1)  # the last column's own logits predict nothing
    loss = hf(input_ids=longer, labels=shifted, use_cache=False).loss * (labels != IGNORE).sum()
    loss.backward()
    found = grads(hf)
    hf.zero_grad()
    return loss.item(), found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        scale = max(1.0, float(grad.abs().max()))
        assert float((ours[name] - grad).abs().max()) <= tolerance * scale, name


MAPS = {"gemma2": LogitsMap(cap=30.0), "cohere": LogitsMap(scale=0.0625), "granite": LogitsMap(scale=1 / 8)}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_the_models_own(name: str) -> None:
    hf = tiny(name)
    model = LanguageModel(hf)
    assert model.fused_loss == (name not in NOT_LINEAR)
    assert model.logits_map == MAPS.get(name, LogitsMap())
    ids, labels = batch()
    want, want_grads = reference(hf, ids, labels)
    loss = model(ids, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want, rel=1e-5)
    same(grads(hf), want_grads)
    with torch.no_grad():
        assert model(ids, labels).item() == pytest.approx(want, rel=1e-5)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny("phi")
    ids, labels = batch(3)
    want, want_grads = reference(hf, ids, labels)
    monkeypatch.setattr("pretrain.models.loss.CHUNK_LOGITS", 97 * 16)
    loss = LanguageModel(hf)(ids, labels)
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    same(grads(hf), want_grads)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.models.loss.CHUNK_LOGITS", 97 * 16)
    ids, labels = batch(4, 32)
    sizes: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (97,) and out._base is None:  # no view of the head
                sizes.append(out.numel() // 97)
            return out

    model = LanguageModel(tiny("llama"))
    with Watch():
        model(ids, labels)
    assert sizes
    assert max(sizes) <= 16 < ids.numel()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_autocast(dtype: torch.dtype, tolerance: float) -> None:
    """The error against fp32 is no larger than what transformers' own 16-bit loss has."""
    ids, labels = batch()
    hf = tiny("llama")
    _, exact = reference(hf, ids, labels)
    with torch.autocast("cpu", dtype):
        _, theirs = reference(hf, ids, labels)
        loss = LanguageModel(hf)(ids, labels)
    loss.backward()
    ours = grads(hf)
    assert loss.dtype == torch.float32
    assert ours["lm_head.weight"].dtype == torch.float32
    error = {n: float((ours[n] - g).norm() / g.norm()) for n, g in exact.items()}
    usual = {n: float((theirs[n] - g).norm() / g.norm()) for n, g in exact.items()}
    assert max(error.values()) < tolerance
    assert all(error[n] <= 1.5 * usual[n] + 1e-4 for n in error)


def test_fp16_keeps_tiny_probabilities() -> None:
    """At 50,000 words p is 2e-5: near fp16's smallest normal number, where a gradient would lose most of its bits."""
    from pretrain.models.loss import linear_cross_entropy

    torch.manual_seed(0)
    hidden, weight = torch.randn(16, 32), torch.randn(50_000, 32) * 0.01
    labels = torch.randint(0, 50_000, (16,))

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            linear_cross_entropy(h, w, None, labels).backward()
        rest = torch.ones(50_000, dtype=torch.bool)
        rest[labels] = False
        assert w.grad is not None
        return w.grad[rest]

    exact = gradient(torch.float32)
    assert float((gradient(torch.float16) - exact).norm() / exact.norm()) < 2e-3


def test_bf16_weights() -> None:
    ids, labels = batch()
    hf = tiny("llama").bfloat16()
    model = LanguageModel(hf)
    assert model.fused_loss
    loss = model(ids, labels)
    loss.backward()
    want, _ = reference(hf.float(), ids, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    ids, labels = batch()
    hf = tiny(name)
    model = LanguageModel(hf)
    plain = model(ids, labels)
    plain.backward()
    expected = grads(hf)
    hf.zero_grad()
    hf.activation_checkpointing_enable({"use_reentrant": False})
    loss = model(ids, labels)
    loss.backward()
    assert loss.item() == plain.item()
    same(grads(hf), expected, 1e-6)


def test_two_backwards_and_frozen_head() -> None:
    ids, labels = batch()
    hf = tiny("llama")
    model = LanguageModel(hf)
    loss = model(ids, labels)
    (loss * 0.5).backward(retain_graph=True)
    once = grads(hf)
    (loss * 0.5).backward()
    same({n: g / 2 for n, g in grads(hf).items()}, once, 1e-6)
    hf.zero_grad()
    hf.lm_head.weight.requires_grad_(False)
    (model(ids, labels) * 0.5).backward()
    assert hf.lm_head.weight.grad is None
    once.pop("lm_head.weight")
    same(grads(hf), once, 1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt_neox", "opt"])
def test_document_mask_keeps_documents_apart(name: str, attention: str) -> None:
    """The loss of packed documents is the sum of each document's alone, and so are the gradients."""
    hf = tiny(name, attention=attention)
    model = LanguageModel(hf)
    lengths = (5, 11, 1, 7)
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(0, 97, (n,), generator=generator) for n in lengths]
    shifted = [torch.cat([d[1:], torch.tensor([IGNORE])]) for d in documents]
    alone = sum(model(d[None], s[None]) for d, s in zip(documents, shifted, strict=True) if len(d) > 1)
    assert isinstance(alone, torch.Tensor)
    alone.backward()
    expected = grads(hf)
    hf.zero_grad()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed_ids, packed_labels = torch.cat(documents)[None], torch.cat(shifted)[None]
    packed = model(packed_ids, packed_labels, positions)
    packed.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    same(grads(hf), expected, 1e-5)
    leaking = model(packed_ids, packed_labels)
    assert abs(leaking.item() - alone.item()) > 1e-4 * alone.item()  # without positions the test would notice


def test_soft_cap_is_seen_while_logits_are_small() -> None:
    """Fresh weights give logits of 0.1, which a cap at 30 changes by 4e-7 only."""
    hf = tiny("gemma2")
    head = hf.get_output_embeddings()
    with torch.no_grad():
        ids = torch.arange(4)[None]
        small = hf(ids).logits
        assert torch.allclose(small, head(hf.base_model(ids).last_hidden_state), rtol=1e-4, atol=1e-5)
    assert not has_plain_head(hf)
    assert has_plain_head(tiny("gemma2", final_logit_softcapping=None))
    assert hf.training


def test_state_has_hugging_face_names_and_ties_once(tmp_path: Path) -> None:
    hf = tiny("llama-tied-biased")
    model = LanguageModel(hf, compile=True)
    state = model.hf_state()
    assert state.keys() == {name for name, _ in model.hf_named_parameters()}
    assert "lm_head.weight" not in state
    assert all(not name.startswith(("hf.", "_orig_mod.")) for name in state)
    other = LanguageModel(tiny("llama-tied-biased", seed=1))
    ids, labels = batch()
    assert other(ids, labels).item() != model.eval()(ids, labels).item()
    other.load(written(state, tmp_path))
    assert other(ids, labels).item() == model(ids, labels).item()
    assert other.hf.lm_head.weight is other.hf.model.embed_tokens.weight


def written(state: dict[str, torch.Tensor], folder: Path) -> TensorFiles:
    write(folder / "model.safetensors", {n: TensorShard(t.detach(), 0, tuple(t.shape)) for n, t in state.items()})
    return TensorFiles([folder / "model.safetensors"])


def test_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = LanguageModel(tiny("llama"))
    state = model.hf_state()
    head = state.pop("lm_head.weight")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        model.load(written(state, tmp_path))
    with pytest.raises(UserError, match=r"lm_head\.weight is \(96, 32\), the model's \(97, 32\)"):
        model.load(written(state | {"lm_head.weight": head[:96]}, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "graph"])
@pytest.mark.parametrize(("precision", "packed"), [("fp32", True), ("bf16", False)])
def test_compiled_equals_eager_and_evaluation_compiles_nothing(precision: str, packed: bool, how: Any) -> None:
    hf = tiny("gpt2")
    eager = LanguageModel(hf)._loss
    ids, labels = batch()
    positions = torch.arange(24).remainder(9).expand(2, -1).contiguous() if packed else None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        want = eager(ids, labels, positions, None)
        want.backward()
        expected = grads(hf)
        hf.zero_grad()
        model = LanguageModel(hf, compile=how)
        loss = model(ids, labels, positions)
    loss.backward()
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    assert loss.item() == pytest.approx(want.item(), rel=tolerance)
    same(grads(hf), expected, tolerance)

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    model.eval()
    with torch.no_grad():
        assert model(ids[:1], labels[:1]).item() > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_fallback_is_cross_entropy_of_the_models_logits() -> None:
    hf = tiny("gemma2").eval()
    ids, labels = batch()
    with torch.no_grad():
        logits = hf(ids).logits
        want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)
        assert LanguageModel(hf)(ids, labels).item() == pytest.approx(want.item(), rel=1e-6)


def test_a_model_that_cannot_keep_documents_apart_says_so() -> None:
    model = LanguageModel(tiny("bloom"))
    ids, labels = batch()
    with pytest.raises(UserError, match="document_mask"):
        model(ids, labels, torch.arange(24).remainder(8).expand(2, -1))
    assert LanguageModel(tiny("opt")).document_mask is by_masks
    assert LanguageModel(tiny("llama")).document_mask is by_positions
