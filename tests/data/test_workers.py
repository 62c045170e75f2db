"""Tokenization in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from texts import TEXTS, parts_of, write_jsonl

from pretrain.data.reading import cut, units
from pretrain.data.sources.local import Local
from pretrain.data.tokenization import tokenize
from pretrain.data.tokenization.tokenize import prepare
from pretrain.runtime.errors import UserError

EOT = 0


def test_parts_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, tokenizer_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of records nor of text without any line end."""
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "a.jsonl")
    (tmp_path / "texts" / "b.txt").write_text(" ".join(" ".join(TEXTS).split()))
    monkeypatch.setattr(cut, "UNIT_BYTES", 40_000)
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 10_000)
    source = Local(nameOrPath=str(tmp_path / "texts"))
    monkeypatch.setattr(tokenize, "WORKERS_FROM_BYTES", 0)
    for workers in (1, 2, 3):
        prepare(source, tokenizer_json=tokenizer_json, eot=EOT, num_workers=workers, cache=tmp_path / str(workers))
    assert len(parts_of(tmp_path / "1")) > 6
    assert parts_of(tmp_path / "1") == parts_of(tmp_path / "2") == parts_of(tmp_path / "3")


def test_two_mistakes_at_the_same_time_are_said_as_one(
    tmp_path: Path, tokenizer_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker stops the work, and nothing is left locked."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_bytes(b"caf\xe9 " * 100)
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 1)
    monkeypatch.setattr(tokenize, "WORKERS_FROM_BYTES", 0)
    with pytest.raises(UserError, match=r"[abc]\.txt: not UTF-8 at byte 3"):
        prepare(
            Local(nameOrPath=str(tmp_path)),
            tokenizer_json=tokenizer_json,
            eot=EOT,
            num_workers=2,
            cache=tmp_path / "cache",
        )
