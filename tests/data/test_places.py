"""`nameOrPath` as a list: files, folders, globs; each file once, in the order of the list."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import pretrain
from pretrain.config.compose import compose, default_name
from pretrain.data.sources.huggingface import HuggingFace
from pretrain.data.sources.listing import notice_once
from pretrain.data.sources.local import Local
from pretrain.data.tokenization.tokenize import prepare
from pretrain.runtime.errors import UserError
from tests.data.formats import documents_of


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """es/a.txt, es/b.txt, more/c.jsonl, d.md"""
    for folder in ("es", "more"):
        (tmp_path / folder).mkdir()
    (tmp_path / "es/a.txt").write_text("uno")
    (tmp_path / "es/b.txt").write_text("dos")
    (tmp_path / "more/c.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "d.md").write_text("four")
    notice_once.cache_clear()
    return tmp_path


def source(*places: Path | str, **options: object) -> Local:
    return Local(nameOrPath=[str(place) for place in places], **options)  # type: ignore[arg-type]


def documents(found: Local) -> list[str]:
    return list(found.documents())


def test_a_list_is_read_in_its_order(texts: Path) -> None:
    assert documents(source(texts / "d.md", texts / "more", texts / "es/*.txt")) == ["four", "three", "uno", "dos"]
    assert documents(source(texts / "es")) == documents_of(texts / "es") == ["uno", "dos"]


def test_a_file_that_is_named_twice_is_read_once(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.link(texts / "d.md", texts / "hard.md")
    found = source(texts / "es/b.txt", texts / "es", texts / "d.md", texts / "es/b.txt", texts / "hard.md")
    assert documents(found) == ["dos", "uno", "four"]
    assert f"3 files are named more than once, such as {texts}/es/b.txt; each is read once" in capsys.readouterr().err


def test_a_missing_place_names_itself(texts: Path) -> None:
    with pytest.raises(UserError, match=rf"^dataset.nameOrPath={texts}/es/c.txt: no such file or folder; did you mean"):
        source(texts / "d.md", texts / "es/c.txt").files()
    with pytest.raises(UserError, match=rf"^dataset.nameOrPath={texts}/\*.csv: no file matches$"):
        source(texts / "d.md", texts / "*.csv").files()


def test_one_place_has_the_identity_of_earlier_versions(texts: Path) -> None:
    """The token cache and its records are found under it."""
    assert Local(nameOrPath=str(texts)).identity() == ["local", str(texts), None, "auto"]
    assert HuggingFace(nameOrPath="a/b").identity() == ["huggingface", "a/b", None, "train", None]
    assert source(texts, texts / "d.md").identity() == ["local", [str(texts), f"{texts}/d.md"], None, "auto"]
    json.dumps(HuggingFace(nameOrPath=["a/b", "c/d"]).identity())


def test_names_of_lists(texts: Path) -> None:
    assert source(texts / "es", texts / "more/*.jsonl").domain == "es+more"
    assert source(texts / "es/a.txt", texts / "es/b.txt", texts / "d.md", texts).domain == "a+b+2"
    assert HuggingFace(nameOrPath=["owner/fr", "owner/de"]).domain == "fr+de"
    for places, name in (
        (["x/es", "y/fr.txt"], "sample-es_fr"),
        ("x/es", "sample-es"),
        (["a", "b", "c"], "sample-a_b_1"),
    ):
        words = ["dataset=local", f"dataset.nameOrPath={places}", "name=???"]
        assert default_name(compose(words)) == name


def test_a_list_in_the_config(texts: Path) -> None:
    config = pretrain.compose(["dataset=local", f"dataset.nameOrPath=[{texts}/d.md, {texts}/es]"])
    assert list(config.dataset.documents()) == ["four", "uno", "dos"]
    with pytest.raises(UserError, match=r"^dataset.nameOrPath=\[1\]: input should be a valid string"):
        pretrain.compose(["dataset=local", "+dataset={nameOrPath: [1]}"])


def test_several_datasets(texts: Path, tokenizer_json: str, tokenizer: Tokenizer) -> None:
    """``datasets`` loads each of them; here from folders, as from the Hub."""
    found = HuggingFace(nameOrPath=[str(texts / "more"), str(texts / "es"), str(texts / "more")])
    store = prepare(found, tokenizer_json=tokenizer_json, eot=0)
    read = [tokenizer.decode(part.tokens[:-1].tolist()) for part in store.parts]
    assert "".join(read).replace("<|endoftext|>", "") == "threeunodos"
