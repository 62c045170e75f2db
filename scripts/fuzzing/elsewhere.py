"""What other code than the project's makes of an input: Python's own readers, pyarrow, tokenizers, transformers."""

from __future__ import annotations

import csv
import gzip
import io
import json
from itertools import chain
from pathlib import Path
from typing import Any

import zstandard

Document = Any  # text, or a list of token ids


def tokenized(cache: Path, model: Path) -> list[list[int]]:
    """The tokens of every document in the token cache of one dataset, without what marks their ends and begins."""
    from pretrain.data.store.token_store import TokenStore

    (manifest,) = (cache / "stores").glob("*.json")
    store, found = TokenStore(manifest), []
    for part in store.parts:
        start = 0
        for end in part.ends.tolist():
            tokens = part.tokens[start:end].tolist()
            found.append(tokens[:-1] if tokens and tokens[-1] == store.eot else tokens)
            start = end
    return found


def same(ours: list[list[int]], theirs: list[Document], tokenizer_json: Path) -> bool:
    """Whether the tokens are those of the other reader's documents; plain text may be cut into documents elsewhere."""
    from tokenizers import Tokenizer

    wanted = encoded(theirs, tokenizer_json)
    decode = Tokenizer.from_file(str(tokenizer_json)).decode
    return ours == wanted or decode([*chain(*ours)]) == decode([*chain(*wanted)])


def documents(files: list[Path], errors: str) -> list[Document]:
    """The documents of data files, by the ends of their names. Raises what its libraries raise for a broken one."""
    found: list[Document] = []
    for file in saved(files) or files:
        found += [document for document in of_file(file, errors) if document_has_text(document)]
    return found


def document_has_text(document: Document) -> bool:
    return bool(document) and not (isinstance(document, str) and document.isspace())


def saved(files: list[Path]) -> list[Path]:
    """The files that a folder saved by ``datasets`` names; nothing for another folder."""
    for file in files:
        if file.name == "state.json":
            return [file.parent / entry["filename"] for entry in json.loads(file.read_text())["_data_files"]]
    return []


def of_file(file: Path, errors: str) -> list[Document]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        return column(pq.read_table(file))
    if file.suffix == ".arrow":
        return column(arrow_table(file))
    raw, name = file.read_bytes(), file.name
    if name.endswith(".gz"):
        raw, name = gzip.decompress(raw), name[:-3]
    elif name.endswith(".zst"):
        raw, name = unzstd(raw), name[:-4]
    text = raw.decode("utf-8-sig", errors)
    if name.endswith((".txt", ".md")):
        return [text]
    if name.endswith(".jsonl"):
        return [value(json.loads(line)) for line in text.split("\n") if line.strip()]
    return of_csv(text) if name.endswith(".csv") else of_json(text)


def unzstd(raw: bytes) -> bytes:
    """All frames, each to its end."""
    found = b""
    while raw:
        frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        found += frame.decompress(raw)
        if not frame.eof:
            raise ValueError("a frame has no end")
        raw = frame.unused_data
    return found


def of_csv(text: str) -> list[Document]:
    csv.field_size_limit(2**31 - 1)
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    index = rows[0].index("text") if "text" in rows[0] else rows[0].index("input_ids")
    return [row[index] for row in rows[1:]]


def of_json(text: str) -> list[Document]:
    """A list of records, one record, or one value after another."""
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        one, stop = decoder.raw_decode(rest)
        found += one if isinstance(one, list) else [one]
        rest = rest[stop:].lstrip()
    return [value(one) for one in found]


def value(record: Any) -> Document:
    if isinstance(record, dict):
        record = record["text"] if "text" in record else record["input_ids"]
    if isinstance(record, bytes):  # a binary column of a table
        return record.decode()
    if record is None or isinstance(record, str):
        return record
    if isinstance(record, list) and all(type(token) is int for token in record):
        return record
    raise ValueError(f"no document: {record!r:.40}")


def arrow_table(file: Path) -> Any:
    import pyarrow as pa

    with pa.OSFile(str(file)) as stream:
        opened = pa.ipc.open_file(stream) if file.read_bytes()[:6] == b"ARROW1" else pa.ipc.open_stream(stream)
        table = opened.read_all()
    table.validate(full=True)
    return table


def column(table: Any) -> list[Document]:
    name = "text" if "text" in table.column_names else "input_ids"
    return [value(item) for item in table.column(name).to_pylist()]


# Tokenizers and models ----------------------------------------------------------------------------------------------------


def encoded(texts: list[Document], tokenizer_json: Path) -> list[list[int]]:
    """Tokens of each document by the file tokenizer.json alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(d, add_special_tokens=False).ids if isinstance(d, str) else d for d in texts]


def held_out(cache: Path, share: float, max_tokens: int) -> list[int]:
    """The tokens that an evaluation scores, in order, behind the end-of-text token that goes before them."""
    from pretrain.data.store.token_store import TokenStore

    (manifest,) = (cache / "stores").glob("*.json")
    store = TokenStore(manifest)
    view = store.views(held_out=share)[1].limited(max_tokens)
    return [store.eot, *view.read(0, view.num_tokens).tolist()]


def loss_of(model: Path, tokens: list[int], length: int) -> float:
    """Mean cross entropy in nats of ``tokens`` but the first, in windows of ``length``, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(
        str(model), dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
    ).eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            window = torch.tensor([tokens[start : start + length + 1]])
            logits = hf(input_ids=window[:, :-1], use_cache=False).logits.float()
            total += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    return total / (len(tokens) - 1)
