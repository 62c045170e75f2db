"""Data files of every format and compression. The same documents as another reader finds in the edited file, or a refusal."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import zstandard

from fuzzing import elsewhere
from fuzzing.kind import VALID, Base, Kind, Verdict, ask, other
from fuzzing.sample import SMALL, documents
from fuzzing.sandbox import Result

PLAIN = ("txt", "md", "jsonl", "json", "csv")
FORMATS = (*PLAIN, *(f"{kind}.{ending}" for kind in ("txt", "jsonl", "json", "csv") for ending in ("gz", "zst")))
TABLES = ("parquet", "arrow", "saved", "ids.jsonl", "lines.json")


class Data(Kind):
    name = "data"
    variants = (*FORMATS, *TABLES, "txt replace", "jsonl replace", "csv replace")
    names = ("dataset.nameOrPath", "data/", "dataset 'data'")

    def make(self, variant: str, place: Path) -> Base:
        kind, _, errors = variant.partition(" ")
        (place / "data").mkdir()
        write(place / "data", kind, documents())
        given = ["task=tokenization", "dataset=local", f"model_name={self.model}", *SMALL, "dataset.nameOrPath=data"]
        return Base(
            place,
            [*given, f"dataset.errors={errors or 'strict'}", "output_dir=run"],
            notes={"errors": errors or "strict"},
        )

    def editable(self, base: Base, place: Path) -> list[Path]:
        return sorted(p for p in (place / "data").rglob("*") if p.is_file() or p.is_symlink())

    def edit(self, draw: Random, base: Base, place: Path) -> str:
        """Of tables half of the edits write the file anew with other values, types or columns."""
        tables = [file for file in self.editable(base, place) if file.suffix == ".parquet" or file.name == "part.arrow"]
        if tables and draw.random() < 0.4:
            file = draw.choice(tables)
            how = odd_table(draw)
            done = ask(place, lambda: write_table(file, *how))
            return f"{file.name}: a table of {how[0]} values {how[1]!r:.200}" if done else "left as it is"
        return super().edit(draw, base, place)

    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        model = self.model
        return ask(place, lambda: elsewhere.tokenized(place / "cache", model))

    def differs(self, base: Base, place: Path, result: Result, outcome: Any) -> Verdict:
        errors = base.notes["errors"]
        files = self.editable(base, place)
        theirs = ask(place, lambda: elsewhere.documents(files, errors))
        if theirs is None:
            return other("read what no other reader reads", f"documents: {outcome!r}"[:2000])
        tokenizer = self.model / "tokenizer.json"
        if ask(place, lambda: elsewhere.same(outcome, theirs, tokenizer)):
            return Verdict(VALID)
        return other("other documents than another reader's", f"{outcome!r:.1500}\nelsewhere: {theirs!r:.1500}")


def write(folder: Path, kind: str, texts: list[str]) -> None:
    """``texts`` in one file of that kind, or in a folder saved by ``datasets``."""
    records = [{"id": index, "text": text} for index, text in enumerate(texts)]
    lines = "".join(json.dumps(record, ensure_ascii=index % 2 == 0) + "\n" for index, record in enumerate(records))
    inner, _, ending = kind.partition(".")
    if kind == "saved":
        ask(folder.parent, lambda: save_to_disk(folder, texts))
    elif kind in ("parquet", "arrow"):
        name = "part.parquet" if kind == "parquet" else "part.arrow"
        ask(folder.parent, lambda: write_table(folder / name, "string", texts, "text"))
    elif kind == "ids.jsonl":
        ids = [[(7 * index + k) % 256 for k in range(20)] for index in range(len(texts))]
        (folder / "part.jsonl").write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in ids))
    elif kind == "lines.json":
        (folder / "part.json").write_text(lines)
    else:
        content = {"txt": "\n\n".join(texts), "md": "# A title\n\n" + "\n\n".join(texts), "jsonl": lines}
        content |= {"json": json.dumps(records, indent=1), "csv": csv_text(texts)}
        raw = content[inner].encode()
        packed = {"": raw, "gz": gzip.compress(raw, mtime=0), "zst": zstandard.compress(raw)}[ending]
        (folder / f"part.{kind}").write_bytes(packed)


def csv_text(texts: list[str]) -> str:
    return "id,text\n" + "".join('{},"{}"\n'.format(i, text.replace('"', '""')) for i, text in enumerate(texts))


def save_to_disk(folder: Path, texts: list[str]) -> bool:
    from datasets import Dataset

    shutil.rmtree(folder)
    Dataset.from_dict({"text": texts}).save_to_disk(folder)
    return True


def odd_table(draw: Random) -> tuple[str, list[Any], str]:
    """Arrow type, values and column of a table that somebody might have."""
    texts: list[Any] = documents()
    choice = draw.randrange(9)
    if choice == 0:
        return "string", [None if draw.random() < 0.5 else text for text in texts], "text"
    if choice == 1:
        return "large_string", texts, "text"
    if choice == 2:
        return "int64", list(range(12)), draw.choice(["text", "input_ids"])
    if choice == 3:
        return (
            "list",
            [[draw.choice([1, 2, 299, 300, -1, 2**40]) for _ in range(5)] for _ in texts],
            draw.choice(["text", "input_ids"]),
        )
    if choice == 4:
        return "binary", [text.encode()[: draw.randint(0, 40)].hex() for text in texts], "text"
    if choice == 5:
        return "string", [], "text"
    if choice == 6:
        return "dictionary", texts, "text"
    return "string", ["", " ", "\n", *texts, "\u0000", "x" * 30_000], draw.choice(["text", "Text", "content"])


def write_table(file: Path, kind: str, values: list[Any], column: str) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "binary":
        array = pa.array([bytes.fromhex(value) for value in values], pa.binary())
    elif kind == "dictionary":
        array = pa.array(values).dictionary_encode()
    else:
        types = {
            "string": pa.string(),
            "large_string": pa.large_string(),
            "int64": pa.int64(),
            "list": pa.list_(pa.int64()),
        }
        array = pa.array(values, types[kind])
    table = pa.table({"id": list(range(len(values))), column: array})
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=5)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    return True
