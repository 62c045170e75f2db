"""Files of every format and compression that is read, with given documents; and the documents that are read of a file."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pretrain.data.reading.cut import cut
from pretrain.data.reading.readers import read
from pretrain.data.sources.local import Local

Documents = Sequence[str]


def documents_of(path: Path | str, **options: Any) -> list[Any]:
    """What a run reads of a file or folder, before the tokenizer: text, or lists of token ids."""
    source = Local(nameOrPath=str(path), **options)
    pieces = [piece for file in source.files() for piece in cut(file, source.options())]
    found = [document for piece in pieces for document in read(piece, source.options())]
    return [document.tolist() if isinstance(document, np.ndarray) else document for document in found]


def jsonl(texts: Documents) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def json_list(texts: Documents) -> bytes:
    return json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=1).encode()


def csv_rows(texts: Documents) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    return file.getvalue().encode()


def parquet(texts: Documents) -> bytes:
    file = io.BytesIO()
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(table, file, row_group_size=max(1, len(texts) // 8))
    return file.getvalue()


def arrow(texts: Documents, new: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    file = io.BytesIO()
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(texts) // 8))
    return file.getvalue()


def arrow_file(texts: Documents) -> bytes:
    return arrow(texts, pa.ipc.new_file)


def zst(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def save_to_disk(texts: Documents, path: Path) -> None:
    datasets.Dataset.from_dict({"text": list(texts)}).save_to_disk(path, num_shards=min(2, len(texts)))


# ending → the bytes of a file with these documents. Plain text has one document a file and is elsewhere.
WRITERS: dict[str, Callable[[Documents], bytes]] = {
    "jsonl": jsonl,
    "json": json_list,
    "csv": csv_rows,
    "parquet": parquet,
    "arrow": arrow,
    "file.arrow": arrow_file,
}
WRITERS |= {
    f"{name}.gz": lambda texts, name=name: gzip.compress(WRITERS[name](texts)) for name in ("jsonl", "json", "csv")
}
WRITERS |= {f"{name}.zst": lambda texts, name=name: zst(WRITERS[name](texts)) for name in ("jsonl", "json", "csv")}
