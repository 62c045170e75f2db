from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.distributed.context import DistributedContext
from pretrain.models.bpe import END_OF_TEXT, train_bpe
from pretrain.models.causal_lm import CausalLM, Pretrained, Scratch
from pretrain.models.generate import generate
from pretrain.models.hub import export
from pretrain.models.language_model import LanguageModel
from pretrain.models.tokenizer import Boundaries
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import write_files
from tests.runs import run_code

CPU = torch.device("cpu")
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "class Sea:\n    ship = 'crew'\n",
    "for stone in road: print(stone)\n",
] * 20
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SCRATCH = Scratch(name_or_path="unused", overrides=LLAMA, train_tokenizer=300)


def build(spec: Pretrained | Scratch, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return spec.build(param_dtype=dtype, device=CPU, seed=seed)


def save(spec: Pretrained | Scratch, model: LanguageModel, folder: Path) -> None:
    alone = DistributedContext()
    dtypes = export.dtypes_for(model.hf, spec.save_dtype)
    own = export.weights_to_write(model.hf_state().items(), dtypes=dtypes, world=alone, sharded=False)
    beside = export.companion_files(model.hf, spec.tokenizer(lambda: iter(TEXTS)), dtype=export.dtype_of(own))
    export.save_full(model.hf, own, folder, shard_size="5GB")
    write_files(beside, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder made by the code under test."""
    folder = tmp_path_factory.mktemp("model")
    SCRATCH.check(64)
    save(SCRATCH, build(SCRATCH), folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_round_trip(whole: Path, tmp_path: Path) -> None:
    spec = Pretrained(name_or_path=str(whole))
    spec.check(64)
    ours = build(spec)
    assert ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(whole)
    ids = torch.arange(10)[None]
    assert torch.equal(ours.eval().hf(ids).logits, theirs.eval()(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert tokenizer.eos_token == END_OF_TEXT
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == tokenizer.eos_token_id == 0
    save(spec, ours, tmp_path)
    again = Pretrained(name_or_path=str(tmp_path))
    assert again.identity() == spec.identity()


@pytest.mark.parametrize(
    ("saved", "trained", "kept"),
    [
        (None, torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_types_of_weights(whole: Path, tmp_path: Path, saved: Any, trained: torch.dtype, kept: torch.dtype) -> None:
    spec = Pretrained(name_or_path=str(whole), save_dtype=saved)
    model = build(spec, trained)
    assert {p.dtype for p in model.parameters()} == {trained}
    save(spec, model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {kept}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == kept
    assert {p.dtype for p in model.parameters()} == {trained}
    assert model.hf.config.dtype == trained


def test_bf16_weights_are_trained_in_fp32_where_asked(whole: Path, tmp_path: Path) -> None:
    half = Pretrained(name_or_path=str(whole), save_dtype="bfloat16")
    save(half, build(half), tmp_path)
    assert {p.dtype for p in build(Pretrained(name_or_path=str(tmp_path))).parameters()} == {torch.float32}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def as_shards(folder: Path) -> None:
    """Two shards in the index, one on disk."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BAD = {
    "no config.json": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "config that is no JSON": (lambda m: (m / "config.json").write_text("{"), "can't be read"),
    "config without a type": (lambda m: (m / "config.json").write_text("{}"), "names no model_type"),
    "unknown type": (lambda m: edit(m / "config.json", model_type="lama"), "no causal language model of type 'lama'"),
    "remote code": (
        lambda m: edit(m / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "m.M"}),
        "trust_remote_code=true",
    ),
    "torn weights": (lambda m: cut(m / "model.safetensors"), "is not a complete safetensors file"),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "is not a complete safetensors file"),
    "weights of noise": (
        lambda m: (m / "model.safetensors").write_bytes(b"x" * 4000),
        "is not a complete safetensors file",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no weights"),
    "pickle": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "pickled"),
    "missing shard": (as_shards, "1 of 2 weight files are missing, e.g. model-00002-of-00002"),
    "tokenizer too large": (lambda m: edit(m / "config.json", vocab_size=100), "300 token ids, the embedding 100 rows"),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "is not a valid tokenizer"),
    "few positions": (lambda m: edit(m / "config.json", max_position_embeddings=32), "32 positions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(name: str, model: Path) -> None:
    spoil, message = BAD[name]
    spoil(model)
    with pytest.raises(UserError, match=message):
        Pretrained(name_or_path=str(model)).check(64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./here", "no such folder"),
        ("a/b/c", "no such folder"),
        (__file__, "a file"),
        ("has space", "neither a folder nor a Hub id"),
        ("gpt2-of-nobody", "Hub can't be reached.*model_name=sample"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    """A process of its own: huggingface_hub reads HF_HUB_OFFLINE when it is imported."""
    code = f"from pretrain.models.causal_lm import Pretrained as P; P(name_or_path={name!r}).check(8)"
    done = run_code(code, HF_HUB_OFFLINE="1")
    assert "UserError" in done.stderr
    assert __import__("re").search(message, done.stderr), done.stderr


def test_mistakes_are_found_without_torch(model: Path) -> None:
    cut(model / "model.safetensors")
    code = f"""
import sys
from pretrain.runtime.errors import UserError
from pretrain.models.causal_lm import Pretrained
try:
    Pretrained(name_or_path={str(model)!r}).check(64)
except UserError:
    assert not {{"torch", "transformers"}} & sys.modules.keys()
    print("seen")
"""
    assert run_code(code).stdout == "seen\n"


def test_weights_that_do_not_fit_the_config(model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"9 weights .* model\.layers\.2"):
        build(Pretrained(name_or_path=str(model)))
    edit(model / "config.json", num_hidden_layers=2, hidden_size=64)
    with pytest.raises(UserError, match="missing from its files or have another shape"):
        build(Pretrained(name_or_path=str(model)))


def test_identity_follows_the_weights(model: Path) -> None:
    spec = Pretrained(name_or_path=str(model))
    before = spec.identity()
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert spec.identity() != before


def test_scratch_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = build(SCRATCH, seed=1).hf_state()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    same, other = build(SCRATCH, seed=1).hf_state(), build(SCRATCH, seed=2).hf_state()
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_scratch_from_the_named_models_config(whole: Path) -> None:
    spec = Scratch(name_or_path=str(whole), overrides={"num_hidden_layers": 1})
    spec.check(64)
    model = build(spec)
    assert model.hf.config.num_hidden_layers == 1
    assert model.hf.config.hidden_size == 32
    assert len(spec.tokenizer(None)) == model.hf.config.vocab_size == 300


def test_scratch_takes_the_tokenizers_size(whole: Path) -> None:
    spec = Scratch(name_or_path=str(whole), overrides=LLAMA)
    spec.check(64)
    assert build(spec).hf.config.vocab_size == 300


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_sise": 64}, r"llama has no 'hidden_sise'; did you mean .*'hidden_size'"),
        ({"max_position_embeddings": 32}, "sequence_length=64"),
        ({"model_type": "lama"}, "no such model"),
        ({"hidden_size": 30}, "model.overrides"),
    ],
)
def test_bad_overrides(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scratch(name_or_path="unused", overrides=LLAMA | overrides, train_tokenizer=300).check(64)


def test_old_config_keys_still_work() -> None:
    spec = Scratch(name_or_path="unused", overrides=LLAMA | {"rope_theta": 5000.0}, train_tokenizer=300)
    spec.check(64)
    assert spec.hf_config().rope_parameters["rope_theta"] == 5000.0


def test_attention_that_the_model_lacks_becomes_eager(capsys: pytest.CaptureFixture[str]) -> None:
    small = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"num_key_value_heads": 2, "head_dim": 8}
    spec = Scratch(name_or_path="x", overrides=small | {"model_type": "gemma2"}, train_tokenizer=300)
    assert build(spec).hf.config._attn_implementation == "eager"
    assert "runs with eager" in capsys.readouterr().err


def test_train_tokenizer_is_deterministic_and_lossless() -> None:
    one, two = (train_bpe(iter(TEXTS), vocab_size=300) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert len(one) == 300
    text = "naïve 漢字 \x00\n\ttabs  and   spaces 😀"
    ids = one(text)["input_ids"]
    assert one.decode(ids) == text
    assert one.eos_token_id == 0
    assert 0 not in ids


def test_train_tokenizer_needs_documents() -> None:
    with pytest.raises(UserError, match="train_tokenizer"):
        SCRATCH.tokenizer(None)


def test_gradient_checkpointing_is_on_when_asked() -> None:
    spec = Scratch(name_or_path="x", overrides=LLAMA, train_tokenizer=300, gradient_checkpointing=True)
    assert build(spec).hf.is_activation_checkpointing


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(whole: Path) -> tuple[Any, Any]:
    spec: CausalLM = Pretrained(name_or_path=str(whole))
    assert isinstance(spec, Pretrained)
    return build(spec), spec.tokenizer(None)


def say(speaker: tuple[Any, Any], prompts: list[str], **given: Any) -> list[str]:
    asked = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95, "seed": 0} | given
    return generate(*speaker, prompts, boundaries=Boundaries(None, 0), **asked)


def test_greedy_is_the_argmax(speaker: tuple[Any, Any]) -> None:
    model, tokenizer = speaker
    ids = tokenizer("def ")["input_ids"]
    model.eval()
    for _ in range(12):
        ids.append(int(model.hf(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    model.train()
    want = tokenizer.decode(ids[len(tokenizer("def ")["input_ids"]) :], skip_special_tokens=True)
    assert say(speaker, ["def "], temperature=0.0) == [want]
    assert model.training


def test_sampling_follows_the_seed_and_not_its_neighbours(speaker: tuple[Any, Any]) -> None:
    state = torch.get_rng_state()
    both = say(speaker, ["def ", "def "])
    assert torch.equal(state, torch.get_rng_state())
    assert both == say(speaker, ["def ", "def "])
    assert both[0] != both[1]
    assert both[1] == say(speaker, ["class ", "def "])[1]
    assert both != say(speaker, ["def ", "def "], seed=7)


def test_generation_stops_where_positions_end(speaker: tuple[Any, Any]) -> None:
    assert len(say(speaker, [""], max_new_tokens=3)) == 1
    long = "a b c d e f g h i j k l m n o p q r s t"
    tokens = len(speaker[1](long)["input_ids"])
    assert 20 < tokens < 64
    assert len(speaker[1](say(speaker, [long], max_new_tokens=500)[0])["input_ids"]) <= 64
    with pytest.raises(UserError, match="64 positions"):
        say(speaker, [long * 4])
