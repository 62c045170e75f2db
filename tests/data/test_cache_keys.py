"""Whatever changes a document's tokens names another part of the cache; what only changes the view of them does not."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from formats import jsonl
from tokenizers import Tokenizer

from pretrain.data.reading import readers
from pretrain.data.reading.cut import cut
from pretrain.data.reading.units import ReadOptions
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization import encode
from pretrain.data.tokenization.tokenize import prepare

TEXTS = ["one two three. " * 20, "four five six. " * 20]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    return tmp_path / "a.jsonl"


def parts(store: TokenStore) -> list[str]:
    return [part.path.name for part in store.parts]


def last_tokens(store: TokenStore) -> set[int]:
    return {int(part.tokens[end - 1]) for part in store.parts for end in part.ends}


def test_another_end_of_text_token_is_another_part(path: Path, tokenizer_json: str) -> None:
    """One cache, one file, two tokens: the second store must not be given the first one's."""
    stores = [prepare(Local(nameOrPath=str(path)), tokenizer_json=tokenizer_json, eot=eot) for eot in (0, 7, 0)]
    assert [last_tokens(store) for store in stores] == [{0}, {7}, {0}]
    assert parts(stores[0]) == parts(stores[2]) != parts(stores[1])


def test_another_tokenizer_is_another_part(path: Path, tokenizer_json: str, tokenizer: Tokenizer) -> None:
    longer = Tokenizer.from_str(tokenizer_json)
    longer.add_tokens(["one two"])
    stores = [
        prepare(Local(nameOrPath=str(path)), tokenizer_json=json, eot=0) for json in (tokenizer_json, longer.to_str())
    ]
    assert parts(stores[0]) != parts(stores[1])
    assert stores[1].num_tokens < stores[0].num_tokens


def test_another_length_of_documents_is_another_part(tmp_path: Path, tokenizer_json: str) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    lengths = [
        prepare(
            Local(nameOrPath=str(tmp_path / "a.txt"), max_document_chars=chars), tokenizer_json=tokenizer_json, eot=0
        )
        for chars in (20_000, 100, 20_000)
    ]
    assert [store.num_documents for store in lengths] == [1, 4, 1]
    assert parts(lengths[0]) == parts(lengths[2]) != parts(lengths[1])


OTHERS = {
    "text_column": "id",
    "errors": "replace",
    "max_document_chars": 100,
    "where": "id > 0",
    "text_template": "{id}",
}


def test_every_option_of_reading_is_in_the_digest(path: Path) -> None:
    named = {field.name for field in fields(ReadOptions)} - {"eot"}  # which is in the key of the part
    assert OTHERS.keys() == named, "a new option needs a row"
    options = ReadOptions()
    (piece,) = cut(Local(nameOrPath=str(path)).files()[0], options)
    digests = [readers.digest(piece, replace(options, **{name: value})) for name, value in OTHERS.items()]
    digests += [readers.digest(piece, options), readers.digest(replace(piece, format="text"), options)]
    assert len(set(digests)) == len(digests)
    assert readers.digest(replace(piece, path=str(path)), ReadOptions(**asdict(options))) == readers.digest(
        piece, options
    )


def test_the_number_of_the_format_is_in_the_key(
    path: Path, tokenizer_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number makes every part anew: how readers or parts have changed is known to it alone."""
    before = prepare(Local(nameOrPath=str(path)), tokenizer_json=tokenizer_json, eot=0)
    monkeypatch.setattr(encode, "FORMAT", encode.FORMAT + 1)
    assert parts(prepare(Local(nameOrPath=str(path)), tokenizer_json=tokenizer_json, eot=0)) != parts(before)


def test_how_the_tokens_are_looked_at_is_not_in_the_key(path: Path, tokenizer_json: str) -> None:
    views = {"held_out": 0.5, "train_data_ratio": 0.5, "deduplicate": True, "document_mask": True, "num_workers": 1}
    before = prepare(Local(nameOrPath=str(path)), tokenizer_json=tokenizer_json, eot=0)
    assert parts(prepare(Local(nameOrPath=str(path), **views), tokenizer_json=tokenizer_json, eot=0)) == parts(before)
