"""Corpora of token ids as other programs write them, written independently of the code that reads them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [300, 301, 302, 303, 0], [9, 10, 0], [11, 12, 13, 0]]
ALL = [token for document in DOCUMENTS for token in document]
Documents = Sequence[Sequence[int]]


def flat(documents: Documents, dtype: str) -> bytes:
    return b"".join(np.array(document, dtype).tobytes() for document in documents)


def megatron(folder: Path, documents: Documents, dtype: str = "uint16", sequences: int = 1) -> Path:
    """As ``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder`` writes it; a document may be several sequences."""
    pieces = [[part.tolist() for part in np.array_split(np.array(document), sequences)] for document in documents]
    lengths = [len(part) for document in pieces for part in document]
    code = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}[dtype]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents) + 1)
    sizes = np.array(lengths, np.int64) * np.dtype(dtype).itemsize
    starts = (np.cumsum(sizes) - sizes).astype(np.int64)
    borders = np.arange(len(documents) + 1, dtype=np.int64) * sequences
    folder.mkdir(exist_ok=True)
    (folder / "a.bin").write_bytes(flat(documents, dtype))
    (folder / "a.idx").write_bytes(
        header + np.array(lengths, np.int32).tobytes() + starts.tobytes() + borders.tobytes()
    )
    return folder / "a.bin"


def datatrove(folder: Path, documents: Documents, dtype: str = "uint16") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.ds").write_bytes(flat(documents, dtype))
    (folder / "a.ds.index").write_bytes(np.cumsum([len(document) for document in documents], dtype=np.uint64).tobytes())
    (folder / "a.ds.metadata").write_text(f"gpt2|{np.dtype(dtype).itemsize}\n18\n0.0 B")
    return folder / "a.ds"


def npy(folder: Path, documents: Documents, dtype: str = "uint16") -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / "a.npy", np.concatenate([np.array(document, dtype) for document in documents]))
    return folder / "a.npy"


def llmc_header(count: int, magic: int = 20240520, version: int = 1) -> bytes:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, count
    return header.tobytes()


def llm_c(folder: Path, documents: Documents, dtype: str = "uint16") -> Path:
    folder.mkdir(exist_ok=True)
    magic, version = (20240520, 1) if dtype == "uint16" else (20240801, 7)
    (folder / "a.bin").write_bytes(llmc_header(sum(map(len, documents)), magic, version) + flat(documents, dtype))
    return folder / "a.bin"


def nanogpt(folder: Path, documents: Documents, dtype: str = "uint16") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.bin").write_bytes(flat(documents, dtype))
    return folder / "a.bin"


# name → writer, type of a token, options that are needed to read it
FORMATS: dict[str, tuple[Callable[..., Path], str, dict[str, Any]]] = {
    "megatron": (megatron, "uint16", {}),
    "megatron int32": (megatron, "int32", {}),
    "megatron, three sequences a document": (lambda *a: megatron(*a, sequences=3), "int32", {}),
    "datatrove": (datatrove, "uint16", {}),
    "datatrove uint32": (datatrove, "uint32", {}),
    "npy": (npy, "uint16", {}),
    "npy int64": (npy, "int64", {}),
    "llm.c": (llm_c, "uint16", {}),
    "llm.c, Llama 3": (llm_c, "uint32", {}),
    "nanoGPT": (nanogpt, "uint16", {"format": "tokens"}),
    "uint32": (nanogpt, "uint32", {"format": "tokens", "token_dtype": "uint32"}),
}
