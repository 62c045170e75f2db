"""What is found out about a model by trying it: whether it sees the future, and how it keeps packed documents apart. No
architecture has a third outcome between "the same as alone" and "refused"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import LEFT_OUT, NAMES, tiny

from pretrain.data.batch import IGNORE
from pretrain.models import probe
from pretrain.models.language_model import LanguageModel
from pretrain.runtime.errors import UserError
from pretrain.strategy.fsdp import Fsdp
from tests.strategy.ranks import as_rank

LENGTHS = (11, 40, 1, 25)  # windows and chunks of these models are 8 tokens
SEPARATE = {
    "by_positions": "llama gemma2 cohere2 mistral mixtral llama4_text deepseek_v3 gpt_neo modernbert-decoder",
    "by_masks": "gpt_oss afmoe opt falcon",
    "refused": "bloom jamba falcon_h1 lfm2 lfm2_moe qwen3_next mamba bart",
}
WAY = {name: way for way, names in SEPARATE.items() for name in names.split()}
FUTURE = "bert roberta xlnet electra cpmant".split()


def documents() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(5, 97, (n,), generator=generator) for n in LENGTHS]
    return ids, [torch.cat([d[1:], torch.tensor([IGNORE])]) for d in ids]


@torch.no_grad()
def assert_alone_or_refused(model: LanguageModel) -> bool:
    """Whether the model takes packed documents; then the loss of each is what it is alone."""
    ids, labels = documents()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    packed = torch.cat(ids)[None]
    nothing = [torch.full_like(given, IGNORE) for given in labels]
    for i, (document, target) in enumerate(zip(ids, labels, strict=True)):
        own = torch.cat([*nothing[:i], target, *nothing[i + 1 :]])[None]
        if model.document_mask is None:
            with pytest.raises(UserError, match="can't keep packed documents apart"):
                model(packed, own, positions)
            return False
        together = model(packed, own, positions)
        assert together.item() == pytest.approx(model(document[None], target[None]).item(), rel=2e-6, abs=1e-6), i
    return True


def found(name: str, **given: Any) -> str:
    model = LanguageModel(tiny(name, **given))
    return "refused" if model.document_mask is None else model.document_mask.__name__


@pytest.mark.parametrize("name", WAY)
def test_packed_documents_are_as_alone_or_refused(name: str) -> None:
    model = LanguageModel(tiny(name)).eval()
    assert assert_alone_or_refused(model) == (WAY[name] != "refused")
    assert found(name) == WAY[name]
    assert found(name, dtype=torch.bfloat16) == WAY[name], "16 bits hide no leak"


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "llama4_text"])
def test_eager_attention_too(name: str) -> None:
    assert assert_alone_or_refused(LanguageModel(tiny(name, attention="eager")).eval())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    if not is_causal(tiny(name).eval()):
        with pytest.raises(UserError, match="is not causal: its logits change with later tokens"):
            LanguageModel(tiny(name))
        return
    model = LanguageModel(tiny(name)).eval()
    apart = assert_alone_or_refused(model)
    if name not in ("inkling2_text", "reformer", "xlstm"):  # these can't compute in 16 bits on a CPU
        assert (found(name, dtype=torch.bfloat16) != "refused") == apart


def test_few_are_left_out() -> None:
    assert len(NAMES) > 150
    assert len(LEFT_OUT) < 25


def test_a_mask_in_the_place_of_the_window_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was done for gpt_oss: one mask of documents for all layers, also those that see a window only."""

    def plain(hf: Any, position_ids: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        document = (position_ids == 0).cumsum(1)
        seen = (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)
        return {"position_ids": position_ids, "attention_mask": seen}

    monkeypatch.setattr(probe, "DOCUMENT_MASKS", (plain,))
    assert probe.find_document_mask(tiny("opt")) is plain
    assert probe.find_document_mask(tiny("gpt_oss")) is None
    assert probe.find_document_mask(tiny("afmoe")) is None


# -- causality --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def is_causal(hf: Any) -> bool:
    ids = torch.arange(10, 50)[None]
    changed = torch.cat([ids[:, :20], ids[:, :20]], 1)
    one, two = (hf(input_ids=given, use_cache=False).logits[:, :20] for given in (ids, changed))
    return bool(torch.allclose(one, two, rtol=1e-5, atol=1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUTURE)
def test_a_model_that_sees_the_future_is_refused(name: str, dtype: torch.dtype) -> None:
    if (name, dtype) == ("xlnet", torch.bfloat16):
        pytest.skip("XLNet computes in no 16 bits: transformers multiplies it with fp32")
    with pytest.raises(UserError, match=r"is not causal: its logits change with later tokens.*is_decoder") as raised:
        LanguageModel(tiny(name, dtype=dtype))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_by_the_whole_sequence_is_no_look_ahead(dtype: torch.dtype) -> None:
    probe.check_causal(tiny("prophetnet", dtype=dtype))


def test_few_tokens_rounded_otherwise_are_no_look_ahead_in_16_bits() -> None:
    """As a GPU rounds ProphetNet: one token of twelve by 0.0016 of its norm; what BERT sees changes all by 0.003 and more."""
    one = torch.ones(1, 12, 97, dtype=torch.bfloat16)
    few, all_ = one.clone(), one * 1.01
    few[0, 10] *= 1.01
    assert probe._is_rounding(few, one)
    assert not probe._is_rounding(all_, one)
    assert not probe._is_rounding(few.float(), one.float())


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_as_a_decoder_it_trains(name: str) -> None:
    model = LanguageModel(tiny(name, is_decoder=True))
    ids, labels = documents()
    assert model(ids[1][None], labels[1][None]).isfinite()


def test_a_sharded_model_is_tried_when_it_has_its_weights() -> None:
    from pretrain.models.causal_lm import Scratch
    from pretrain.models.model_factory import ModelFactory
    from tests.strategy.ranks import set_up

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    spec = Scratch(name_or_path="none", overrides=shape | {"model_type": "bert"}, train_tokenizer=300)
    with as_rank(0, 1) as world, pytest.raises(UserError, match="is not causal"):
        set_up(Fsdp(), ModelFactory(spec, torch.float32, 0), world)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "opt"])
def test_a_trial_leaves_no_trace(name: str) -> None:
    hf = tiny(name)
    config, weights = hf.config.to_dict(), {n: p.clone() for n, p in hf.named_parameters()}
    state = torch.get_rng_state()
    LanguageModel(hf)
    assert torch.equal(torch.get_rng_state(), state)
    assert hf.training
    assert hf.config.to_dict() | {"use_cache": None} == config | {"use_cache": None}
    assert all(torch.equal(weights[n], p) for n, p in hf.named_parameters())
    assert all("forward" not in vars(m) and not m._forward_hooks for m in hf.modules())
