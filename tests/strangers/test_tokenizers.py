"""Tokenizer folders as people have them: what a run makes of each, and what its export then holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.models.causal_lm import Pretrained
from pretrain.runtime.errors import UserError
from pretrain.telemetry.sinks.jsonl import read_records
from tests.tokenizer_files import EOS, UNK, folder

ROWS = 800  # of the embedding: more than any of the tokenizers has tokens


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """``weights(scale)``: a small Llama whose logits are ``scale`` times as large as fresh ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(scale: float) -> Path:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, max_position_embeddings=64, **shape))
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        path = tmp_path_factory.mktemp("weights")
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="module")
def fresh(weights: Callable[[float], Path]) -> Path:
    return weights(1.0)


def model(path: Path, weights: Path, kind: str = "byte_level", *changes: str, **named: Any) -> Path:
    """A whole model folder around a tokenizer."""
    folder(path, kind, *changes, **named)
    config = json.loads((weights / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 3]}))
    shutil.copy(weights / "model.safetensors", path)
    return path


def with_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))


def replaced(path: Path, name: str, content: bytes) -> None:
    """``name`` instead of the tokenizer.json."""
    (path / "tokenizer.json").unlink()
    (path / name).write_bytes(content)


def edited(path: Path, change: Callable[[dict[str, int]], None]) -> None:
    """The vocabulary of tokenizer.json, changed."""
    content = json.loads((path / "tokenizer.json").read_text())
    change(content["model"]["vocab"])
    (path / "tokenizer.json").write_text(json.dumps(content))


CHAT = {"changes": ["adds_tokens"], "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
# kind of file, what is in its configs, what is done to the folder, overrides → exit code, words of stderr
TABLE: dict[str, tuple[str, dict[str, Any], Callable[[Path], None] | None, list[str], int, str]] = {
    "as it should be": ("byte_level", {}, None, [], 0, ""),
    "a class with rules of its own": (
        "unigram",
        {"tokenizer_class": "GPT2Tokenizer"},
        None,
        [],
        0,
        "AutoTokenizer (GPT2Tok",
    ),
    "a class that there is not": ("word_piece", {"tokenizer_class": "NoSuch"}, None, [], 0, ""),
    "an instruct model": ("byte_level", CHAT, None, [], 0, "<|endoftext|> ends each document; <|im_end|>"),
    "a token it does not have": (
        "byte_level",
        {"pad_token": "<|p|>"},
        None,
        [],
        0,
        "would add 1 tokens, such as '<|p|>'",
    ),
    "no end of text": (
        "byte_level",
        {"eos_token": None},
        None,
        [],
        2,
        "name the token that ends a document, or its id, as",
    ),
    "no end of text, named": ("byte_level", {"eos_token": None}, None, ["dataset.separator='</s>'"], 0, ""),
    "a separator that is none": (
        "byte_level",
        {},
        None,
        ["dataset.separator=nope"],
        2,
        "dataset.separator='nope': not a token",
    ),
    "a separator beyond the end": (
        "byte_level",
        {},
        None,
        ["dataset.separator=500"],
        2,
        "the tokenizer's ids are 0 to 499",
    ),
    "a BOS it does not name": ("byte_level", {"bos_token": None}, None, ["dataset.bos=true"], 2, "has no bos_token"),
    "a bos that is no word for it": ("byte_level", {}, None, ["dataset.bos=maybe"], 2, "dataset.bos='maybe'"),
    "larger than the embedding": (
        *("byte_level", {}, lambda p: with_config(p, vocab_size=499), []),
        *(2, "the tokenizer has 500 token ids, the embedding 499 rows"),
    ),
    "larger: what to do": (
        "byte_level",
        {},
        lambda p: with_config(p, vocab_size=9),
        [],
        2,
        "resize_token_embeddings(500)",
    ),
    "invented tokens do not count": (
        *("byte_level", {"unk_token": "<|u|>"}, lambda p: with_config(p, vocab_size=500), []),
        *(0, "AutoTokenizer (TokenizersBackend) would add 1 tokens, such as '<|u|>'"),
    ),
    "vocab.txt alone": (
        "byte_level",
        {},
        lambda p: replaced(p, "vocab.txt", b"a\nb\n" * 9),
        [],
        2,
        "copy tokenizer.json",
    ),
    "broken": ("byte_level", {}, lambda p: replaced(p, "tokenizer.json", b'{"model": 3}'), [], 2, "tokenizer"),
    "two tokens with one id": (
        *("byte_level", {}, lambda p: edited(p, lambda v: v.update({"!": v['"']})), []),
        *(2, "assigns one id to two tokens: '!' and '\"' are both"),
    ),
    "nested": (
        *("byte_level", {}, lambda p: replaced(p, "tokenizer.json", b'{"model": ' + b"[" * 100_000), []),
        *(2, "tokenizer.json is not a valid tokenizer: RecursionError"),
    ),
    "none": ("byte_level", {}, lambda p: (p / "tokenizer.json").unlink(), [], 2, "it has no tokenizer.json; copy"),
}


@pytest.mark.parametrize("case", TABLE)
def test_tokenizing(case: str, tmp_path: Path, fresh: Path, corpus: Path, command) -> None:
    kind, options, damage, overrides, expected, words = TABLE[case]
    changes = options.get("changes", [])
    path = model(tmp_path / "m", fresh, kind, *changes, **{k: v for k, v in options.items() if k != "changes"})
    if damage:
        damage(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    arguments = ["task=tokenization", f"model_name={path}", "dataset=local", f"dataset.nameOrPath={corpus}"]
    code, out, err = command([*arguments, "evaluation=new_only", "sequence_length=32", *overrides])
    assert code == expected, err
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == (1 if words else 0), err
    assert ("tokens, 3" in out) == (code == 0), out  # of 40 documents
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "overrides", "more"),
    [
        ({}, [], 0),
        ({"changes": ["bos_only"]}, [], 1),
        ({"changes": ["bos_only"]}, ["dataset.bos=false"], 0),
        ({}, ["dataset.bos=true"], 1),
    ],
)
def test_a_bos_is_one_token_more_of_each_document(options, overrides, more, tmp_path, fresh, corpus, command) -> None:
    path = model(tmp_path / "m", fresh, "byte_level", *options.get("changes", []))
    arguments = ["task=tokenization", f"model_name={path}", "dataset=local", f"dataset.nameOrPath={corpus}"]
    code, out, err = command(
        [*arguments, "evaluation=new_only", "sequence_length=32", "dataset.held_out=0", *overrides]
    )
    assert code == 0, err
    found = int(out.split("training: ")[1].split(" tokens")[0].replace(",", ""))
    code, out, err = command(
        [*arguments, "evaluation=new_only", "dataset.held_out=0", "sequence_length=32", "dataset.bos=false"]
    )
    assert found == int(out.split("training: ")[1].split(" tokens")[0].replace(",", "")) + 40 * more


def run(path: Path, out: Path, corpus: Path) -> list[str]:
    return [
        *(
            f"model_name={path}",
            f"output_dir={out}",
            "dataset=local",
            f"dataset.nameOrPath={corpus}",
            "evaluation=new_only",
        ),
        *("sequence_length=32", "batch_size=2", "max_steps=2", "lr=1e-4", "evaluation.max_tokens=300"),
    ]


def test_an_instruct_model_with_a_bos_from_end_to_end(tmp_path: Path, fresh: Path, corpus: Path, command) -> None:
    path = model(
        tmp_path / "m",
        fresh,
        "byte_level",
        "bos_only",
        "adds_tokens",
        tokenizer_class="LlamaTokenizerFast",
        eos_token="<|im_end|>",
    )
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [504, 2]}))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    code, _, err = command(run(path, tmp_path / "run", corpus))
    assert code == 0, err
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    for place in ("model", "checkpoints/step-00000002"):
        assert all((tmp_path / "run" / place / name).read_bytes() == (path / name).read_bytes() for name in kept)
    exported = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert exported["eos_token_id"] == [504, 2, 4]  # the model's own, and the token that ends documents
    (sample,) = [r for r in read_records(tmp_path / "run/metrics.jsonl") if r["event"] == "sample" and r["step"] == 0]
    assert "<s>" not in sample["prompt"]
    code, _, err = command(["task=export", f"model_name={tmp_path / 'run'}", f"output_dir={tmp_path / 'again'}"])
    assert code == 0, err
    again = tmp_path / "again/model"
    assert all((again / name).read_bytes() == (path / name).read_bytes() for name in kept)
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == [504, 2, 4]
    code, _, err = command(
        [
            "task=generation",
            f"model_name={again}",
            f"output_dir={tmp_path / 'g'}",
            "generation.max_new_tokens=3",
            "sequence_length=32",
        ]
    )
    assert code == 0, err


def test_a_model_of_another_tokenizer_is_said_at_step_0(tmp_path: Path, weights, corpus: Path, command) -> None:
    path = model(tmp_path / "m", weights(200.0))
    code, _, err = command(run(path, tmp_path / "run", corpus))
    assert code == 0, err
    assert (
        err.count("WARNING: at step 0 the model is worse than a uniform guess over its vocabulary of 800 tokens (6.68")
        == 1
    )
    assert "worse than a uniform guess" in (tmp_path / "run/report.html").read_text()
    assert json.loads((tmp_path / "run/run.json").read_text())["uniform_loss"] == pytest.approx(6.6846, abs=1e-4)


def test_a_run_is_continued_only_with_the_same_borders(tmp_path: Path, fresh: Path, corpus: Path, command) -> None:
    path = model(tmp_path / "m", fresh, "byte_level", "bos_only")
    arguments = run(path, tmp_path / "run", corpus)
    code, _, err = command(arguments)
    assert code == 0, err
    assert "WARNING" not in err, "a fresh model is no worse than a guess"
    for change, words in {
        "dataset.bos=false": "dataset.bos: auto → False",
        f"dataset.separator='{UNK}'": f"dataset.separator: auto → {UNK}",
    }.items():
        code, _, err = command([*arguments, change, "max_steps=3"])
        assert code == 2
        assert words in err
    code, _, err = command([*arguments, "dataset.bos=true", f"dataset.separator='{EOS}'", "max_steps=3"])
    assert code == 0, err  # the same tokens, said in words


def test_a_panic_in_rust_prints_nothing_of_its_own(tiny_model, tmp_path, capfd):
    """A template for one text that names a second one: the library panics, and Rust would print that first."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    sequences = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    template = {"type": "TemplateProcessing", "single": sequences, "pair": sequences, "special_tokens": {}}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": template}))
    with pytest.raises(UserError, match=r"no usable tokenizer: tokenizer\.json: index out of bounds"):
        Pretrained(name_or_path=str(folder)).tokenizer(None)
    assert capfd.readouterr().err == ""
