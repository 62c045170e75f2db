"""What trains, and is exported, is the folder's tokenizer.json, whatever class transformers would make of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from pretrain.models import tokenizer as module
from pretrain.models.tokenizer import Boundaries, adds_bos, boundaries, folder_tokenizer
from pretrain.runtime.errors import UserError
from tests.tokenizer_files import CHANGES, KINDS, LINES, folder, made

# Every class of a causal architecture, with one of the architectures that have it; None: those that have none.
CLASSES = {TOKENIZER_MAPPING_NAMES.get(kind): kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
ALL_CLASSES = sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name})


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notices."""
    found: list[str] = []
    monkeypatch.setattr(module, "notice", found.append)
    return found


@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja", "tokenizer_config.json", "tokenization_x.py"])
def test_no_file_of_another_name_is_read_and_exported(name: str, tmp_path: Path) -> None:
    """A cloned folder may hold links: what they lead to would be in every export, and on the Hub with it."""
    (tmp_path / "credentials").write_text("the secret")
    path = tmp_path / "m"
    folder(path, "byte_level")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(tmp_path / "credentials")
    with pytest.raises(
        UserError, match=rf"{name} is a link to .*credentials, a file of another name outside the folder"
    ):
        folder_tokenizer(path)


def test_links_to_the_same_file_elsewhere_and_to_the_blobs_of_the_hub_s_cache(tmp_path: Path) -> None:
    disk, snapshot, blobs = tmp_path / "disk", tmp_path / "models--a--b/snapshots/0", tmp_path / "models--a--b/blobs"
    folder(disk, "byte_level")
    for made_there in (snapshot, blobs, linked := tmp_path / "linked"):
        made_there.mkdir(parents=True)
    for number, file in enumerate(sorted(disk.iterdir())):
        (linked / file.name).symlink_to(file)
        shutil.copy(file, blobs / f"{number:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    assert ids(folder_tokenizer(linked)) == ids(folder_tokenizer(snapshot)) == ids(folder_tokenizer(disk))


def ids_of_file(path: Path) -> list[list[int]]:
    library = Tokenizer.from_file(str(path / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    return [library.encode(line, add_special_tokens=False).ids for line in LINES]


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(line, add_special_tokens=False)["input_ids"] for line in LINES]


def assert_is_the_file(path: Path, out: Path) -> Any:
    """The ids of the library, the vocabulary of the file, and an export that is the same files."""
    tokenizer = folder_tokenizer(path)
    library = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert ids(tokenizer) == ids_of_file(path)
    assert tokenizer.get_vocab() == library.get_vocab()
    assert tokenizer.decode(ids(tokenizer)[0]) == library.decode(ids(tokenizer)[0], skip_special_tokens=False)
    out.mkdir(parents=True)
    tokenizer.save_pretrained(out)
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "config.json"}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    return tokenizer


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_of_a_causal_model_and_every_kind_of_file(class_name: str | None, tmp_path: Path, said) -> None:
    named = {"tokenizer_class": class_name} if class_name else {}
    for kind in KINDS:
        path = folder(tmp_path / kind, kind, model_type=CLASSES[class_name], **named)
        tokenizer = assert_is_the_file(path, tmp_path / "out" / kind)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        auto = module._auto(path, False)
        same = not isinstance(auto, str) and works_like(auto, tokenizer)
        assert same or any(str(path) in line for line in said), "where transformers differs a notice says so"


def works_like(auto: Any, tokenizer: Any) -> bool:
    try:
        return ids(auto) == ids(tokenizer)
    except Exception:  # a class whose unknown token the file does not have
        return False


@pytest.mark.slow
@pytest.mark.parametrize("class_name", ALL_CLASSES)
def test_every_class_there_is_named_by_a_llama(class_name: str, tmp_path: Path) -> None:
    for kind in KINDS:
        path = folder(tmp_path / kind, kind, tokenizer_class=class_name)
        assert_is_the_file(path, tmp_path / "out" / kind)


@pytest.mark.parametrize(("kind", "change"), product(KINDS, CHANGES))
def test_what_a_file_may_hold_besides(kind: str, change: str, tmp_path: Path) -> None:
    for class_name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer"):
        path = folder(tmp_path / class_name, kind, change, tokenizer_class=class_name)
        tokenizer = assert_is_the_file(path, tmp_path / "out" / class_name)
        assert adds_bos(tokenizer) == (change in ("bos_only", "bos_and_eos"))


def test_an_export_is_loaded_by_transformers(tmp_path: Path) -> None:
    for class_name in (None, "PreTrainedTokenizerFast", "TokenizersBackend"):
        path = folder(tmp_path / f"{class_name}", "byte_level", "adds_tokens", tokenizer_class=class_name)
        (path / "chat_template.jinja").write_text("{{ messages }}")
        (path / "special_tokens_map.json").write_text("{}")
        out = tmp_path / f"out-{class_name}"
        out.mkdir()
        folder_tokenizer(path).save_pretrained(out)
        shutil.copy(path / "config.json", out)
        loaded = AutoTokenizer.from_pretrained(out)
        assert ids(loaded) == ids_of_file(path)
        assert loaded.chat_template == "{{ messages }}"


def test_digits_by_threes_stay_so(tmp_path: Path, said: list[str]) -> None:
    path = folder(tmp_path / "m", "byte_level", model_type="qwen2", tokenizer_class="LlamaTokenizerFast")
    tokenizer = folder_tokenizer(path)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234567")
    assert [text for text, _ in split] == ["123", "456", "7"]
    assert len(said) == 1
    assert "AutoTokenizer (Qwen2Tokenizer) would give other tokens" in said[0]


def test_a_class_that_invents_tokens_makes_the_model_no_other(tmp_path: Path, said: list[str]) -> None:
    path = folder(tmp_path / "m", "byte_level", tokenizer_class="GPT2Tokenizer", unk_token="<|none|>")
    assert len(folder_tokenizer(path).get_vocab()) == 500
    assert len(said) == 1


def test_a_token_that_the_file_does_not_have_is_left_out(tmp_path: Path, said: list[str]) -> None:
    path = folder(tmp_path / "m", "byte_level", pad_token="<|none|>", tokenizer_class="NoSuchClass")
    tokenizer = folder_tokenizer(path)
    assert (tokenizer.pad_token_id, len(tokenizer.get_vocab())) == (None, 500)
    assert len(said) == 1
    assert "<|none|>" in said[0]


def test_the_same_rules_in_other_words_keep_their_name_in_the_cache(tmp_path: Path, said: list[str]) -> None:
    """A run begun when AutoTokenizer's words named the tokens is continued."""
    path = folder(tmp_path / "m", "byte_level")
    whole = json.loads((path / "tokenizer.json").read_text())
    whole["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (path / "tokenizer.json").write_text(json.dumps(whole))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}))
    auto = AutoTokenizer.from_pretrained(path).backend_tokenizer.to_str()
    assert auto != Tokenizer.from_file(str(path / "tokenizer.json")).to_str()
    assert folder_tokenizer(path).backend_tokenizer.to_str() == auto
    assert said == []


# The tokens around documents -------------------------------------------------------------------------------------------

AUTO: dict[str, Any] = {"bos": "auto", "separator": "auto"}
AROUND: dict[str, tuple[dict[str, Any], dict[str, Any], Boundaries]] = {
    "no BOS": ({}, {}, Boundaries(None, 2)),
    "asked for": ({}, {"bos": True}, Boundaries(1, 2)),
    "added by the file": ({"changes": ["bos_only"]}, {}, Boundaries(1, 2)),
    "with an EOS": ({"changes": ["bos_and_eos"]}, {}, Boundaries(1, 2)),
    "not wanted": ({"changes": ["bos_only"]}, {"bos": False}, Boundaries(None, 2)),
    "the config adds it": ({"add_bos_token": True}, {}, Boundaries(1, 2)),
    "the config adds none": ({"changes": ["bos_only"], "add_bos_token": False}, {}, Boundaries(None, 2)),
    "the config adds one that is not there": ({"bos_token": None, "add_bos_token": True}, {}, Boundaries(None, 2)),
    "padded": ({"changes": ["pads"]}, {}, Boundaries(None, 2)),
    "one token is both": ({"bos_token": "</s>", "add_bos_token": True}, {}, Boundaries(None, 2)),
    "one token is both, asked for": ({"bos_token": "</s>"}, {"bos": True}, Boundaries(2, 2)),
    "a token": ({}, {"separator": "<|endoftext|>"}, Boundaries(None, 4)),
    "an id": ({}, {"separator": 17}, Boundaries(None, 17)),
    "instruct": (
        {"changes": ["adds_tokens"], "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"},
        {},
        Boundaries(None, 4),
    ),
    "no chat template": ({"changes": ["adds_tokens"], "eos_token": "<|im_end|>"}, {}, Boundaries(None, 504)),
    "a chat model whose EOS ends texts": ({"chat_template": "{{ messages }}"}, {}, Boundaries(None, 2)),
}


@pytest.mark.parametrize("case", AROUND)
def test_boundaries(case: str, tmp_path: Path, said: list[str]) -> None:
    options, asked, expected = AROUND[case]
    named = {key: value for key, value in options.items() if key != "changes"}
    tokenizer = folder_tokenizer(folder(tmp_path, "byte_level", *options.get("changes", []), **named))
    assert boundaries(tokenizer, **(AUTO | asked)) == expected
    assert len([line for line in said if "ends a turn" in line]) == (case == "instruct")


def test_a_template_in_a_file_of_its_own_makes_an_instruct_tokenizer_too(tmp_path: Path) -> None:
    path = folder(tmp_path, "byte_level", "adds_tokens", eos_token={"content": "<|im_end|>", "special": True})
    (path / "chat_template.jinja").write_text("{{ messages }}")
    assert boundaries(folder_tokenizer(path), **AUTO) == Boundaries(None, 4)


@pytest.mark.parametrize(
    ("asked", "named", "words"),
    [
        ({"separator": "<|endoftxt|>"}, {}, r"dataset.separator='<\|endoftxt\|>'.*did you mean '<\|endoftext\|>'"),
        ({"separator": 500}, {}, "dataset.separator=500: the tokenizer's ids are 0 to 499"),
        ({}, {"eos_token": None}, "no end-of-text token.*dataset.separator"),
        ({"bos": True}, {"bos_token": None}, "dataset.bos=true: the tokenizer has no bos_token"),
    ],
)
def test_tokens_that_are_not_there(asked: dict, named: dict, words: str, tmp_path: Path) -> None:
    tokenizer = folder_tokenizer(folder(tmp_path, "byte_level", **named))
    with pytest.raises(UserError, match=words):
        boundaries(tokenizer, **(AUTO | asked))


# Without a tokenizer.json ----------------------------------------------------------------------------------------------


def legacy(path: Path, model_type: str) -> Path:
    """vocab.json and merges.txt instead of tokenizer.json."""
    folder(path, "byte_level", model_type=model_type)
    model = json.loads(made("byte_level"))["model"]
    (path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (path / "tokenizer.json").unlink()
    return path


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_older_files_are_what_transformers_makes_of_them(model_type: str, tmp_path: Path) -> None:
    path, out = legacy(tmp_path / "m", model_type), tmp_path / "out"
    tokenizer = folder_tokenizer(path)
    tokenizer.save_pretrained(out)
    shutil.copy(path / "config.json", out)
    assert len(tokenizer.get_vocab()) == 500
    assert ids(folder_tokenizer(out)) == ids(tokenizer) == ids(AutoTokenizer.from_pretrained(out))


WITHOUT: dict[str, tuple[str, bytes, str, str]] = {  # file, its content, model type, words
    "sentencepiece": (
        "tokenizer.model",
        b"\n\x05",
        "llama",
        r"no tokenizer.json but tokenizer.model; create one once, where senten",
    ),
    "tiktoken": (
        "qwen.tiktoken",
        b"IQ== 0\n",
        "qwen2",
        "no tokenizer.json but qwen.tiktoken; create one once, where tiktoken",
    ),
    "tekken": (
        "tekken.json",
        b"{}",
        "mistral",
        "no tokenizer.json but tekken.json; create one once, where mistral_common",
    ),
    "nothing": ("notes", b"", "llama", "no tokenizer.json; copy tokenizer.json from the model's own folder"),
    "a class that reads no vocab.txt": (
        "vocab.txt",
        b"a\nb\nc\nd\ne\nf\n",
        "gpt2",
        "GPT2Tokenizer has . tokens where .* have 6",
    ),
    "vocab.json that is none": ("vocab.json", b"[1]", "gpt2", "vocab.json: not a JSON object"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_what_is_missing_is_said(case: str, tmp_path: Path) -> None:
    name, content, model_type, words = WITHOUT[case]
    if case in ("sentencepiece", "tiktoken", "tekken") and importlib.util.find_spec(
        module.CONVERTED_BY[PATTERNS[case]]
    ):
        pytest.skip("the package that converts the file is installed here; without it this would be refused")
    path = folder(tmp_path, "byte_level", model_type=model_type)
    (path / "tokenizer.json").unlink()
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        folder_tokenizer(path)


PATTERNS = {"sentencepiece": "*.model", "tiktoken": "*.tiktoken", "tekken": "tekken.json"}

BROKEN: dict[str, tuple[str, bytes]] = {
    "no JSON": ("tokenizer.json", b"{"),
    "an empty object": ("tokenizer.json", b"{}"),
    "a list": ("tokenizer.json", b"[]"),
    "nested deeply": ("tokenizer.json", b"[" * 100_000),
    "a pickle": ("tokenizer.json", b"\x80\x04K\x01."),
    "an unknown model": ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Nothing", "vocab": {}}}'),
    "merges of unknown tokens": (
        "tokenizer.json",
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}',
    ),
    "a Unigram without tokens": (
        "tokenizer.json",
        b'{"version": "1.0", "model": {"type": "Unigram", "vocab": [], "unk_id": 3}}',
    ),
    "no unknown token": (
        "tokenizer.json",
        b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}',
    ),
    "a template of a token it does not list": (
        "tokenizer.json",
        b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<s>": 0, "<unk>": 1}, "unk_token": "<unk>"},'
        b'"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],'
        b'"pair": [], "special_tokens": {}}}',
    ),
    "config that is no JSON": ("tokenizer_config.json", b"\x80\x04K\x01."),
    "config that is a list": ("tokenizer_config.json", b"[]"),
    "config that is nested deeply": ("tokenizer_config.json", b"[" * 100_000),
    "map that is no JSON": ("special_tokens_map.json", b"nothing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(case: str, tmp_path: Path) -> None:
    name, content = BROKEN[case]
    path = folder(tmp_path, "byte_level")
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"no usable tokenizer: {name}"):
        folder_tokenizer(path)
