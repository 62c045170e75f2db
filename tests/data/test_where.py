"""`dataset.where` and `dataset.text_template`: which rows are kept, in every format with columns, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from formats import documents_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.reading.condition import parsed
from pretrain.data.reading.rows import documents_of_records
from pretrain.data.reading.units import ReadOptions
from pretrain.data.reading.where import _Evaluation, repeated_lines, repeated_phrases
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization.tokenize import prepare
from pretrain.runtime.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"text": "hola mundo", "lang": "es", "score": 0.9, "flag": True, "n": 3, "title": "T", "meta": {"src": "a"}},
    {"text": "hello", "lang": "en", "score": 0.95, "flag": False, "n": 5, "title": None, "meta": {"src": "b"}},
    {"text": "x", "lang": None, "score": None, "flag": None, "n": None, "title": "U", "meta": None},
    {"text": "adiós", "lang": "es", "score": 0.1, "flag": True, "n": 2**60, "title": "V", "meta": {"src": None}},
]


def _csv(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, [name for name in rows[0] if name != "meta"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    file, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
# condition → rows that are kept, in every format
KEPT = {
    "lang == 'es' and score > 0.8": [0],
    "lang != 'es'": [1],
    "not (lang == 'es')": [1],  # not of missing is missing
    "lang in ('es', 'fr')": [0, 3],
    "lang not in ('es', 'fr')": [1],
    "score is None": [2],
    "score is not None and score < 0.5": [3],
    "score is None or score > 0.92": [1, 2],
    "flag": [0, 3],
    "not flag": [1],
    "flag == true": [0, 3],
    "n == 1152921504606846976": [3],
    "n / 2 - 1 > 1": [1, 3],
    "-score < -0.92": [1],
    "0.2 < score < 0.92": [0],
    "'ol' in text": [0],
    "len(text) == 5": [1, 3],  # characters, not bytes
    "words(text) > 1": [0],
    "lines(text) == 1": [0, 1, 2, 3],
    r"matches(text, r'^h')": [0, 1],
    "count(text, '[lo]') >= 3": [0, 1],
    "startswith(text, 'h') and endswith(text, 'o') and contains(text, 'll')": [1],
    "lower(title) == 't'": [0],
    "column('lang') == 'en'": [1],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    for ending, write in WRITERS.items():
        (path / f"a.{ending}").write_bytes(write(ROWS))
    return path


@pytest.mark.parametrize("ending", WRITERS)
def test_the_rows_for_which_the_condition_is_true_are_kept(folder: Path, ending: str) -> None:
    found = {condition: documents_of(folder / f"a.{ending}", where=condition) for condition in KEPT}
    assert found == {condition: [ROWS[row]["text"] for row in rows] for condition, rows in KEPT.items()}


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "arrow"])
def test_fields_of_objects(folder: Path, ending: str) -> None:
    assert documents_of(folder / f"a.{ending}", where="meta.src == 'a'") == ["hola mundo"]
    assert documents_of(folder / f"a.{ending}", where="meta.src is None") == ["x", "adiós"]
    assert documents_of(folder / f"a.{ending}", where="meta is not None and n < 9") == ["hola mundo", "hello"]


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(
    ("condition", "line"),
    [
        ("langg == 'es'", "no column 'langg' (dataset.where); the columns there: text, lang, score"),
        ("lang > 3", ""),
        ("matches(text, '(')", "missing )"),
        ("score", ""),
    ],
    ids=["unknown", "type", "pattern", "number"],
)
def test_a_condition_that_does_not_fit_is_one_line(folder: Path, ending: str, condition: str, line: str) -> None:
    path = folder / f"a.{ending}"
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        documents_of(path, where=condition)
    assert line in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "dataset.where" in str(error.value)


def test_the_row_of_a_csv_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,score\na,1\nb,\nc,many\n")
    with pytest.raises(UserError, match=r"a\.csv:4: dataset\.where: score: 'many' is not a number"):
        documents_of(tmp_path / "a.csv", where="score > 0")
    (tmp_path / "a.csv").write_text("text,score\na,1\nb,\nc,-2e0\n")
    assert documents_of(tmp_path / "a.csv", where="score > 0") == ["a"]


def test_text_beside_numbers_in_one_column_names_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "2"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: dataset\.where: column 'n' holds numbers and text"):
        documents_of(tmp_path / "a.jsonl", where="n > 0")


def test_a_key_that_some_records_lack_is_missing_there(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "n": 2}\n{"text": "c", "n": null}\n')
    assert documents_of(tmp_path / "a.jsonl", where="n > 0") == ["b"]
    assert documents_of(tmp_path / "a.jsonl", where="n is None") == ["a", "c"]


def test_names_of_columns_stay_on_one_line(tmp_path: Path) -> None:
    record = {"text": "a", "bad\n\x1b[2J": 1} | {f"column{number}": 0 for number in range(99)}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    for options in ({"where": "n > 0"}, {"text_template": "{n}"}, {"text_column": "n"}):
        with pytest.raises(UserError, match=r"text, 'bad\\n\\x1b\[2J', column0, .*, column47, …$"):
            documents_of(tmp_path / "a.jsonl", **options)


def test_plain_text_is_the_column_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    assert documents_of(tmp_path / "a.txt", where="words(text) == 3") == ["one two three"]
    assert documents_of(tmp_path / "a.txt", where="words(text) > 3") == []
    with pytest.raises(UserError, match=r"no column 'lang'.*the columns there: text$"):
        documents_of(tmp_path / "a.txt", where="lang == 'es'")


def test_token_ids_have_a_length(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": [3]}\n')
    assert documents_of(tmp_path / "a.jsonl", where="len(input_ids) > 1") == [[1, 2]]


def test_bytes_that_are_not_text_name_their_row(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "lang": pa.array([b"es", b"\xff"], pa.binary()).view(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 1: not UTF-8 at byte 0"):
        documents_of(tmp_path / "a.parquet", where="lang == 'es'")
    assert documents_of(tmp_path / "a.parquet", where="lang == 'es'", errors="replace") == ["a"]


def test_dates_are_compared_with_text(tmp_path: Path) -> None:
    dates = pa.array(["2019-05-01T00:00:00", "2021-01-01T00:00:00"]).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["old", "new"], "date": dates}), tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet", where="date >= '2020-01-01'") == ["new"]


# What a condition can't be --------------------------------------------------------------------------------------------


ATTACKS = [
    "__import__('os').system('touch /tmp/owned') == 0",
    "open('/etc/passwd')",
    "().__class__.__bases__ == text",
    "text.__class__() == 1",
    "[x for x in text]",
    "(lambda: text)()",
    "(text := 1)",
    "f'{text}' == ''",
    "text[0] == 'a'",
    "9**9**9 > score",
    "read_csv('a.csv') == text",
    "exec(text)",
    "text if text else text",
    "'a' % text",
    "score == 1j",
    "score == 10000000000000000000000",
    "text == b'x'",
    "(" * 3000 + "text",
    "not " * 900 + "text",
    "-" * 3900 + "score",
    "text == 'a' or " * 200 + "text == 'b'" + " " * 4000,
    "text == '\0'\0",
    "lang = 'es'",
    "lang == 'es' AND score > 1",
    "score == None",
    "len(text, 3) > 1",
    "len(*text)",
    "matches(text, text)",
    "lang in lang",
    "lang in ()",
    "lang is 'es'",
    "lang in ('es', 'pt') == true",
    "lang in ('es', 'pt') is None",
    "1 < 2",
    "text" + ".a" * 1500 + " == 1",
    "text" + ".a" * 100 + " == 1",
    "column('a')" + ".a" * 100 + " == 1",
    "column(a).b == 1",
    "column().b == 1",
    "column(1, 2).b == 1",
    r"text == '\ud800'",
    r"text in ('a', '\udfff')",
    r"matches(text, '\ud800')",
    r"column('\ud800') == 1",
    "",
]


@pytest.mark.parametrize("condition", ATTACKS, ids=range(len(ATTACKS)))
def test_nothing_else_is_a_condition(condition: str) -> None:
    with pytest.raises(UserError, match=r"^dataset\.where=[^\n]+$"):
        parsed(condition)


def test_the_fields_of_a_column_may_be_as_deep_as_a_condition() -> None:
    assert parsed("text" + ".a" * 99 + " == 1").paths == (("text", *["a"] * 99),)
    assert parsed("column('a b').c.d == 1").paths == (("a b", "c", "d"),)


def test_an_operand_of_a_chain_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time does not double with each level of nesting."""
    computed: list[str] = []
    compare = _Evaluation._compare

    def counting(self: _Evaluation, name: str, *values: Any) -> Any:
        computed.append(name)
        return compare(self, name, *values)

    monkeypatch.setattr(_Evaluation, "_compare", counting)
    condition = "true == a"
    for _ in range(8):
        condition = f"true == ({condition}) == true"
    rows = [({"a": a, "text": str(a)}, lambda: "here") for a in (True, False, None)]
    assert list(documents_of_records(rows, ReadOptions(where=condition), "")) == ["True", None, None]
    assert len(computed) == 1 + 2 * 8


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.sampled_from(["n", "m", "text", "1", "0.5", "'a'", "None", "true"]),
        lambda inner: (
            st.builds(
                "({} {} {})".format,
                inner,
                st.sampled_from(["and", "or", "==", "<", "+", "/", "is", "in", "in (1, 'a') ==", "< 1 <"]),
                inner,
            )
            | st.builds("(not {})".format, inner)
            | st.builds("len({})".format, inner)
            | st.builds("(-{})".format, inner)
        ),
        max_leaves=8,
    )
)
def test_any_condition_is_computed_or_one_line(condition: str) -> None:
    """Whatever is composed of its parts: rows or a ``UserError``, never another error."""
    rows = [{"text": "a", "n": 1, "m": 0.5}, {"text": "b", "n": None, "m": 0}, {"text": "c", "m": 2}]
    found = []
    with contextlib.suppress(UserError):
        found = list(documents_of_records([(row, lambda: "here") for row in rows], ReadOptions(where=condition), ""))
    assert len(found) in (0, len(rows))


# Templates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", WRITERS)
def test_a_template_joins_columns(folder: Path, ending: str) -> None:
    """A missing value is empty; a row without any value is no document. A shell passes a line end as two characters."""
    path = folder / f"a.{ending}"
    assert documents_of(path, text_template=r"{title}\n\n{text}") == [
        "T\n\nhola mundo",
        "\n\nhello",
        "U\n\nx",
        "V\n\nadiós",
    ]
    assert documents_of(path, text_template="{{{score}}}") == ["{0.9}", "{0.95}", "{0.1}"]
    assert documents_of(path, text_template="{title}: {text}", where="lang == 'es'") == ["T: hola mundo", "V: adiós"]
    with pytest.raises(UserError, match=r"no column 'body' \(dataset.text_template\); the columns there: text, lang"):
        documents_of(path, text_template="{title} {body}")


@pytest.mark.parametrize(
    "template", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9999999999}", "{a:{b}}", "{}", "{a", "a}", "no column"]
)
def test_a_template_has_plain_names_only(folder: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"^dataset\.text_template=[^\n]+$"):
        documents_of(folder / "a.jsonl", text_template=template)


def test_plain_text_has_no_columns_to_join(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(UserError, match="no columns to join"):
        documents_of(tmp_path / "a.txt", text_template="{text}")


# Counts and keys ------------------------------------------------------------------------------------------------------


def test_what_is_removed_is_counted_and_cached(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    (tmp_path / "a.parquet").write_bytes(_parquet(ROWS))
    every, some = store_of(tmp_path / "a.parquet"), store_of(tmp_path / "a.parquet", where="lang == 'es'")
    assert [sum(part.num_removed for part in store.parts) for store in (every, some)] == [0, 2]
    assert (every.num_documents, some.num_documents) == (4, 2)
    again = store_of(tmp_path / "a.parquet", where="lang == 'es'")
    assert [part.path for part in again.parts] == [part.path for part in some.parts]
    assert sum(part.num_removed for part in again.parts) == 2


def test_a_changed_column_of_the_condition_is_another_part(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    """Parquet is named by the columns that are read; those of the condition are among them, and of the template."""
    (tmp_path / "a.parquet").write_bytes(_parquet(ROWS))
    before = store_of(tmp_path / "a.parquet", where="lang == 'es'")
    (tmp_path / "a.parquet").write_bytes(_parquet([ROWS[0] | {"lang": "en"}, *ROWS[1:]]))
    assert (before.num_documents, store_of(tmp_path / "a.parquet", where="lang == 'es'").num_documents) == (2, 1)


def test_keys_without_the_new_options_are_those_of_before() -> None:
    assert ReadOptions().key() == {"text_column": "text", "errors": "strict", "max_document_chars": 20_000}
    assert ReadOptions().values() == ["text", "strict", 20_000]
    assert ReadOptions(where="a").values() != ReadOptions(text_template="a").values()


def test_everything_removed_is_one_line(tmp_path: Path, tokenizer_json: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(WRITERS["jsonl"](ROWS))
    with pytest.raises(UserError, match=r"dataset\.where.* removes all 4 documents"):
        prepare(Local(nameOrPath=str(tmp_path), where="lang == 'xx'"), tokenizer_json=tokenizer_json, eot=0)


def test_repetition() -> None:
    assert repeated_lines("a\nb\n\na\n a \nc") == pytest.approx(2 / 5)
    assert repeated_phrases("a b c d e " * 3) == pytest.approx(6 / 11)
    assert repeated_lines("") == repeated_phrases("one two") == 0
