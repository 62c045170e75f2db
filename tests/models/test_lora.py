"""``transform=[lora]``: what PEFT injects, the merged model, and adapters in PEFT's format."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pretrain.config.compose import run_config
from pretrain.models import compilation
from pretrain.models.hub.export import save_full
from pretrain.models.language_model import LanguageModel
from pretrain.models.transforms.apply import apply_transforms, plain_model, weights_of
from pretrain.models.transforms.lora import Lora, is_adapter
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import write_files
from tests.models.tiny import changed, check_what_a_shard_reads, tiny

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))


def exported(model, transformed, folder):
    """Write ``model/`` and its companions; return the model that transformers reads."""
    companions = {}
    state = {name: tensor.detach().clone() for name, tensor in weights_of(model).items()}
    plain = plain_model(model)
    save_full(plain, transformed.export(plain, state, companions), folder / "model", shard_size="5GB")
    for name, files in companions.items():
        (folder / name).mkdir()
        write_files(files, folder / name)
    read, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] | info["unexpected_keys"]
    return read.eval()


ROWS = {
    "llama": Lora(rank=4),
    "gpt2": Lora(rank=4, alpha=4),
    "gpt_neox": Lora(rank=3, rslora=True),
    "llama-tied-biased": Lora(rank=4, modules_to_save=["embeddings"]),
    "qwen3": Lora(rank=4, dora=True, modules_to_save=["head", "norm"]),
    "opt": Lora(rank=4, dora=True, targets="q_proj|fc1"),
    "mixtral": Lora(rank=4, targets="[qv]_proj$"),
    "bloom": Lora(rank=32),
}


@pytest.mark.parametrize("shape", ROWS)
def test_transformers_and_peft_read_the_trained_model(shape, tmp_path):
    model, base = tiny(shape), tiny(shape).eval()
    transformed = apply_transforms([ROWS[shape]], model, seed=0)
    with torch.no_grad():
        start = model.eval()(IDS).logits
        assert (start - base(IDS).logits).abs().max() < 1e-5, "an update starts at zero"
        logits = changed(model)(IDS).logits
        assert (logits - start).abs().max() > 1e-2
        merged = exported(model, transformed, tmp_path)(IDS).logits
        torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-5)
        opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(opened(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    if shape in ("llama", "gpt2"):
        every = {"llama": "down gate k o q up v", "gpt2": "c_attn c_fc c_proj"}[shape].split()
        wanted = {f"{name}_proj" if shape == "llama" else name for name in every}
        assert set(config["target_modules"]) == wanted


def test_what_is_trained_and_how_fast():
    model = tiny("llama")
    lora = Lora(rank=4, modules_to_save=["embeddings", "layers.0.input_layernorm"], modules_to_save_lr=0.1)
    transformed = apply_transforms([lora], model, seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    in_full = {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"}
    assert transformed.lr_factors == dict.fromkeys(in_full, 0.1)
    assert {name for name in trained if not is_adapter(name)} == in_full
    assert len(trained) == 2 + 2 * 2 * 7
    scale = model.model.layers[0].mlp.up_proj.scaling["default"]
    assert scale == 2.0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dora", [False, True])
def test_a_shard_reads_the_same_values_that_a_full_model_has(exact_model, dora):
    for shape in ("llama-tied", "gpt2"):
        lora = Lora(rank=4, dora=dora, modules_to_save=["embeddings"])
        state = check_what_a_shard_reads(exact_model(shape), lora)
        values = [state[name] for name in state if name.endswith("lora_A.default.weight")]
        assert len({float(v.detach().sum()) for v in values}) == len(values)


def test_an_adapter_is_trained_further(tmp_path):
    lora = Lora(rank=4, dora=True, rslora=True, targets="[qv]_proj|down", modules_to_save=["head"])
    model = tiny("qwen2")
    transformed = apply_transforms([lora], model, seed=0)
    exported(changed(model), transformed, tmp_path)
    again = tiny("qwen2")
    apply_transforms([Lora(adapter=str(tmp_path / "adapter"), dropout=0.1)], again, seed=5)
    ours, theirs = dict(again.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].requires_grad == theirs[name].requires_grad
        for name in ours
    )
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits)
    fresh = peft.get_peft_model(tiny("gpt2"), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    changed(fresh).save_pretrained(tmp_path / "theirs")
    continued = tiny("gpt2")
    apply_transforms([Lora(adapter=str(tmp_path / "theirs"))], continued, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(continued.eval()(IDS).logits, fresh(IDS).logits)


def damaged(folder, **changes):
    """A copy of an adapter with other settings."""
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    other = folder.with_name(f"damaged-{'-'.join(changes)}")
    other.mkdir(exist_ok=True)
    (other / "adapter_config.json").write_text(json.dumps(config))
    (other / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    return other


def test_adapters_that_can_not_be_continued(tmp_path):
    model = tiny("llama")
    exported(model, apply_transforms([Lora(rank=4)], model, seed=0), tmp_path)
    adapter: Path = tmp_path / "adapter"
    rows = {
        "no adapter of PEFT: .*adapter_config.json is missing": tmp_path / "model",
        "its peft_type is 'IA3', not LORA": damaged(adapter, peft_type="IA3"),
        "init_lora_weights='pissa' changes the base model": damaged(adapter, init_lora_weights="pissa"),
        "bias='all' is not supported": damaged(adapter, bias="all"),
        r"has \[4, 32\]|is \[4, 32\] instead of \[8, 32\]": damaged(adapter, r=8),
        r"does not fit this model: .*down_proj.* is not in the model": damaged(adapter, target_modules=["v_proj"]),
    }
    (damaged(adapter, rows=1) / "adapter_model.safetensors").rename(tmp_path / "gone.bin")
    rows["has no adapter_model.safetensors; other formats of weights are not read"] = tmp_path / "damaged-rows"
    for message, folder in rows.items():
        lora = Lora(adapter=str(folder))
        with pytest.raises(UserError, match=message):
            lora.check()
            apply_transforms([lora], tiny("llama"), seed=0)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), damaged(adapter, r=4) / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"does not fit this model: .* is missing"):
        apply_transforms([Lora(adapter=str(tmp_path / "damaged-r"))], tiny("llama"), seed=0)


@pytest.mark.parametrize(
    ("shape", "lora", "message"),
    [
        (
            "llama",
            Lora(rank=33, targets="q_proj"),
            r"transform.lora.rank=33: model.layers.0.self_attn.q_proj is 32 × 32, whose",
        ),
        ("llama", Lora(rank=400), "rank=400: model.layers.0.self_attn.q_proj is 32 × 32"),
        (
            "gpt2",
            Lora(targets="q_proj"),
            r"targets='q_proj' matches no linear layer; there is transformer.h.\*.attn.c_attn, ",
        ),
        (
            "mixtral",
            Lora(targets="experts"),
            r"there is .*weights of fused layers, which LoRA can't update: .*gate_up_proj",
        ),
        ("llama", Lora(modules_to_save=["wte"]), "modules_to_save: no module 'wte'; there is embeddings, head, model"),
        ("llama-tied-biased", Lora(targets="lm_head", rank=4), "lm_head is tied to another weight"),
    ],
)
def test_what_can_not_be_meant(shape, lora, message):
    with pytest.raises(UserError, match=message):
        apply_transforms([lora], tiny(shape), seed=0)


def test_auto_leaves_out_what_is_smaller_than_the_rank(capsys):
    model = tiny("llama", num_key_value_heads=1)  # its keys and values are 8 × 32
    apply_transforms([Lora(rank=16)], model, seed=0)
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (
        "without model.layers.*.self_attn.k_proj, model.layers.*.self_attn.v_proj, which are smaller"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rank=0"], "transform.lora.rank=0: input should be greater than 0"),
        (["rnk=8"], "Lora has no 'rnk'; did you mean 'rank'"),
        (["targets='('"], r"transform.lora.targets='\(': not a regular expression"),
        (["adapter=nowhere"], "transform.lora.adapter=nowhere: no adapter of PEFT"),
        (["adapter=nowhere", "rank=8"], "transform.lora.rank with transform.lora.adapter: the adapter itself sets it"),
    ],
)
def test_mistakes_before_torch_is_needed(words, message):
    with pytest.raises(UserError, match=message):
        run_config(["transform=[lora]", *(f"transform.lora.{word}" for word in words)])


def test_without_peft(monkeypatch):
    monkeypatch.setattr("pretrain.models.transforms.lora.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package peft: pip install 'pretrain\[peft\]'"):
        run_config(["transform=[lora]"])


@pytest.mark.slow
def test_compiled_it_trains_the_same(monkeypatch):
    """The blocks with their updates are compiled a fixed number of times, and the gradients are those of an uncompiled model. The
    compiler is given graphs that are run as they are, so no C++ compiler is needed."""
    graphs, found = [], []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    torch._dynamo.reset()
    compilation.compiled.cache_clear()
    try:
        for compiled in (False, True):
            hf = tiny("llama", num_hidden_layers=4)
            transformed = apply_transforms((Lora(rank=4),), hf, seed=0)
            changed(hf)
            model = LanguageModel(hf, compile=compiled, transformed=transformed).train()
            loss = model(IDS[:, :-1], IDS[:, 1:])
            loss.backward()
            found.append((float(loss.detach()), {n: p.grad for n, p in hf.named_parameters() if p.requires_grad}))
    finally:
        torch._dynamo.reset()
        compilation.compiled.cache_clear()
    assert len(graphs) == 3, "the first block, whose input needs no gradient; all other blocks; the loss"
    (expected, gradients), (loss, ours) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)
