"""Corpora of token ids that other programs wrote. All tokens that the file has by numpy, in its order, or a refusal."""

from __future__ import annotations

import struct
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing import elsewhere
from fuzzing.kind import VALID, Base, Kind, Verdict, ask, other
from fuzzing.sample import SMALL, VOCABULARY
from fuzzing.sandbox import Result

EOT = 0
COUNT = 40  # documents
LLMC = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
MEGATRON = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class Corpora(Kind):
    name = "corpora"
    variants = ("megatron", "megatron int32", "datatrove", "npy", "llmc", "nanogpt", "nanogpt open end")
    names = ("dataset.nameOrPath", "data/", "dataset 'data'", "dataset 'part'", "part.")

    def make(self, variant: str, place: Path) -> Base:
        draw = np.random.default_rng(0)
        documents = [[*draw.integers(1, VOCABULARY, draw.integers(1, 30)).tolist(), EOT] for _ in range(COUNT)]
        if variant.endswith("open end"):
            documents[-1].pop()  # these are copied, not read in place
        kind, _, dtype = variant.partition(" ")
        (place / "data").mkdir()
        write(place / "data", kind, documents, dtype if dtype == "int32" else "uint16")
        given = ["task=tokenization", "dataset=local", f"model_name={self.model}", *SMALL, f"dataset.separator={EOT}"]
        form = {"npy": ["dataset.pattern=*.npy"], "nanogpt": ["dataset.format=tokens"]}.get(kind, [])
        return Base(place, [*given, "dataset.nameOrPath=data", *form, "output_dir=run"], notes={"kind": kind})

    def editable(self, base: Base, place: Path) -> list[Path]:
        return sorted(p for p in (place / "data").rglob("*") if p.is_file() or p.is_symlink())

    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        model = self.model
        return ask(place, lambda: elsewhere.tokenized(place / "cache", model))

    def differs(self, base: Base, place: Path, result: Result, outcome: Any) -> Verdict:
        kind = base.notes["kind"]
        theirs = ask(place, lambda: tokens(place / "data", kind))
        ours = [token for token in chain(*outcome or []) if token != EOT]
        if outcome is not None and theirs is not None and ours == [token for token in theirs if token != EOT]:
            return Verdict(VALID)
        return other("other tokens than numpy's", f"{outcome!r:.1500}\nnumpy: {theirs!r:.1500}")


def write(folder: Path, kind: str, documents: list[list[int]], dtype: str) -> None:
    """``documents`` in one file of that kind, with what belongs to it."""
    flat = np.array([*chain(*documents)], dtype)
    lengths = np.array([len(document) for document in documents])
    ends = np.cumsum(lengths)
    if kind == "megatron":
        code = {"uint16": 8, "int32": 4}[dtype]
        head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
        starts, borders = (ends - lengths) * flat.itemsize, np.arange(len(documents) + 1)
        index = [lengths.astype(np.int32), starts.astype(np.int64), borders.astype(np.int64)]
        (folder / "part.idx").write_bytes(head + b"".join(column.tobytes() for column in index))
        (folder / "part.bin").write_bytes(flat.tobytes())
    elif kind == "datatrove":
        (folder / "part.ds").write_bytes(flat.tobytes())
        (folder / "part.ds.index").write_bytes(ends.astype(np.uint64).tobytes())
    elif kind == "npy":
        np.save(folder / "part.npy", flat)
    elif kind == "llmc":
        head = np.zeros(256, np.int32)
        head[:3] = 20240520, 1, len(flat)
        (folder / "part.bin").write_bytes(head.tobytes() + flat.tobytes())
    else:
        (folder / "part.bin").write_bytes(flat.tobytes())


def tokens(folder: Path, kind: str) -> list[int]:
    """All tokens of the files of a folder by numpy."""
    found: list[int] = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".ds", ".npy")):
        raw = path.read_bytes()
        if kind == "npy":
            found += np.load(path).reshape(-1).tolist()
        elif kind == "megatron":
            code = (folder / "part.idx").read_bytes()[17]
            found += np.frombuffer(raw, MEGATRON[code]).tolist()
        elif kind == "datatrove":
            count = int(np.frombuffer((folder / "part.ds.index").read_bytes(), "<u8")[-1])
            found += np.frombuffer(raw, f"<u{len(raw) // count}").tolist()
        elif kind == "llmc" and (header := struct.unpack("<2i", raw[:8])) in LLMC:
            found += np.frombuffer(raw[1024:], LLMC[header]).tolist()
        else:
            found += np.frombuffer(raw, "<u2").tolist()
    return found
