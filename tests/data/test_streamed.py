"""`dataset.streaming=true`: the files of a dataset of Hugging Face `datasets`, read in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.reading import units
from pretrain.data.sources.huggingface import HuggingFace
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization.encode import Encoder
from pretrain.data.tokenization.tokenize import prepare
from pretrain.runtime.errors import UserError
from tests.data.conftest import EOT
from tests.data.formats import WRITERS
from tests.data.texts import TEXTS


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of four shards of parquet, and where ``datasets`` would write its copy."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "copies")
    (tmp_path / "shards/data").mkdir(parents=True)
    for number in range(4):
        path = tmp_path / f"shards/data/train-{number:05d}-of-00004.parquet"
        path.write_bytes(WRITERS["parquet"](TEXTS[number * 100 : number * 100 + 100]))
    (tmp_path / "shards/data/test-00000-of-00001.parquet").write_bytes(WRITERS["parquet"](TEXTS[400:420]))
    return tmp_path / "shards"


def source(folder: Path, **options: Any) -> HuggingFace:
    return HuggingFace(nameOrPath=str(folder), streaming=True, **options)


def tokens(store: TokenStore) -> list[int]:
    return [token for part in store.parts for token in part.tokens.tolist()]


def test_the_tokens_are_those_of_the_copy_and_none_is_made(hub: Path, tokenizer_json: str, tmp_path: Path) -> None:
    streamed = prepare(source(hub), tokenizer_json=tokenizer_json, eot=EOT)
    assert not list(tmp_path.glob("copies/**/*.arrow"))
    copied = prepare(HuggingFace(nameOrPath=str(hub)), tokenizer_json=tokenizer_json, eot=EOT)
    assert tokens(streamed) == tokens(copied)
    assert streamed.num_documents == 400
    test = prepare(source(hub, split="test"), tokenizer_json=tokenizer_json, eot=EOT)
    assert test.num_documents == 20


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "txt"])
def test_the_other_formats(kind: str, tmp_path: Path, tokenizer_json: str) -> None:
    (tmp_path / "shards").mkdir()
    lines = "first line\r\n\nthird\rfourth\n  \nlast, ñ".encode()
    raw = lines if kind == "txt" else WRITERS[kind](TEXTS[:30])
    (tmp_path / f"shards/train.{kind}").write_bytes(raw)
    streamed = prepare(source(tmp_path / "shards"), tokenizer_json=tokenizer_json, eot=EOT)
    copied = prepare(HuggingFace(nameOrPath=str(tmp_path / "shards")), tokenizer_json=tokenizer_json, eot=EOT)
    assert tokens(streamed) == tokens(copied)
    assert streamed.num_documents == (5 if kind == "txt" else 30) - (kind == "txt")


def test_a_stopped_start_continues_at_its_shard_and_max_tokens_ends_it(
    hub: Path, tokenizer_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 1000)
    shards: list[str] = []
    encode, stop_at = Encoder.encode, [3]

    def counting(self: Encoder, unit: Any, progress: Any) -> Any:
        if len(shards) == stop_at[0]:
            raise KeyboardInterrupt
        shards.append(Path(unit.pieces[0].path).name[:11])
        return encode(self, unit, progress)

    monkeypatch.setattr(Encoder, "encode", counting)
    monkeypatch.setattr("pretrain.data.tokenization.files_record.YOUNG_SECONDS", -1e9)
    with pytest.raises(KeyboardInterrupt):
        prepare(source(hub), tokenizer_json=tokenizer_json, eot=EOT)
    assert shards == ["train-00000", "train-00001", "train-00002"]
    stop_at[0] = 10
    store = prepare(source(hub), tokenizer_json=tokenizer_json, eot=EOT)
    assert shards[3:] == ["train-00003"]
    limit = int(store.part_tokens[1]) + 1000
    shards.clear()
    limited = prepare(source(hub, max_tokens=limit), tokenizer_json=tokenizer_json, eot=EOT)
    assert limited.num_tokens <= limit
    assert tokens(limited) == tokens(store)[: limited.num_tokens]
    assert len(limited.parts) == 2


def test_what_is_not_streamed(hub: Path, tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"split": "train[:10%]"}, r"a slice can't be streamed; dataset.max_tokens limits a dataset$"),
        ({"split": "trian"}, r"no such split; did you mean 'train'\?$"),
        ({"subset": "en"}, "en"),
    ]
    for options, says in mistakes:
        with pytest.raises(UserError, match=says):
            source(hub, **options).files()
    card = {"configs": [{"config_name": "default", "data_files": "data/*.csv", "sep": ";"}]}
    (tmp_path / "card/data").mkdir(parents=True)
    (tmp_path / "card/data/a.csv").write_text("text;id\nx;1\n")
    (tmp_path / "card/README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(UserError, match=r"its README.md sets sep; set dataset.streaming=false$"):
        source(tmp_path / "card").files()
    (tmp_path / "xz").mkdir()
    (tmp_path / "xz/train.jsonl.xz").write_bytes(b"")
    with pytest.raises(UserError, match=r"\.xz is not streamed; set dataset.streaming=false$"):
        source(tmp_path / "xz").files()


def test_a_copy_keeps_its_identity(hub: Path) -> None:
    assert source(hub).identity() == [*HuggingFace(nameOrPath=str(hub)).identity(), "streaming"]
