"""Files of token ids whose index or header lies: one line, never another document."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data.reading.cut import cut
from pretrain.data.reading.readers import read
from pretrain.data.reading.units import ReadOptions
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.runtime.errors import UserError
from tests.data.token_writers import (
    ALL,
    DOCUMENTS,
    datatrove,
    llmc_header,
    megatron,
)


def header(version: int = 1, code: int = 8, sequences: int = 5, documents: int = 6) -> bytes:
    return b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, sequences, documents)


LENGTHS = np.array([4, 2, 5, 3, 4], np.int32)
STARTS = ((np.cumsum(LENGTHS) - LENGTHS) * 2).astype(np.int64)
BORDERS = np.arange(6, dtype=np.int64)


def index(head: bytes = header(), lengths: Any = LENGTHS, starts: Any = STARTS, borders: Any = BORDERS) -> bytes:
    return (
        head
        + np.array(lengths, np.int32).tobytes()
        + np.array(starts, np.int64).tobytes()
        + np.array(borders, np.int64).tobytes()
    )


LIES: dict[str, bytes] = {
    "cut off": index()[:-1],
    "only a header": header(),
    "half a header": header()[:20],
    "another version": index(header(version=2)),
    "floats": index(header(code=7)),
    "no such type": index(header(code=200)),
    "2^63 sequences": index(header(sequences=2**63)),
    "2^64 - 1 documents": index(header(documents=2**64 - 1)),
    "counts whose sizes overflow": index(header(sequences=2**64 - 12, documents=2**61)),
    "a negative length": index(lengths=[4, -2, 9, 3, 4]),
    "more tokens than the file": index(lengths=[4, 2, 5, 3, 2**31 - 1]),
    "fewer tokens than the file": index(lengths=[4, 2, 5, 3, 3]),
    "an offset behind the end": index(starts=[0, 8, 12, 22, 2**62]),
    "a negative offset": index(starts=[-8, 8, 12, 22, 28]),
    "sequences that overlap": index(starts=[0, 0, 12, 22, 28]),
    "documents that go back": index(borders=[0, 3, 2, 4, 5, 5]),
    "documents behind the last sequence": index(borders=[0, 1, 2, 3, 4, 2**40]),
    "negative documents": index(borders=[-1, 1, 2, 3, 4, 5]),
    "documents that leave sequences out": index(borders=[0, 1, 2, 3, 4, 4]),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_of_megatron_that_lies_is_one_line(
    tmp_path: Path, store_of: Callable[..., TokenStore], name: str
) -> None:
    path = megatron(tmp_path, DOCUMENTS)
    assert (tmp_path / "a.idx").read_bytes() == index()
    (tmp_path / "a.idx").write_bytes(LIES[name])
    with pytest.raises(UserError, match=r"^[^\n]*/a\.(idx|bin): [^\n]+$"):
        store_of(path)


def ends(*values: int) -> bytes:
    return np.array(values, np.uint64).tobytes()


DATATROVE_LIES = {
    "cut off": ends(4, 6, 11, 14, 18)[:-3],
    "empty": b"",
    "no documents": ends(0),
    "ends that go back": ends(4, 11, 6, 14, 18),
    "ends that overflow": ends(4, 6, 11, 14, 2**64 - 1),
    "fewer tokens than the file": ends(4, 6, 11, 14),
    "more tokens than the file": ends(4, 6, 11, 14, 19),
}


@pytest.mark.parametrize("name", DATATROVE_LIES)
def test_an_index_of_datatrove_that_lies_is_one_line(
    tmp_path: Path, store_of: Callable[..., TokenStore], name: str
) -> None:
    path = datatrove(tmp_path, DOCUMENTS)
    (tmp_path / "a.ds.index").write_bytes(DATATROVE_LIES[name])
    with pytest.raises(UserError, match=r"^[^\n]*/a\.ds(\.index)?: [^\n]+$"):
        store_of(path)


def numpy_file(shape: str, kind: str = "<u2", order: str = "False", data: bytes = b"\0" * 8) -> bytes:
    return numpy_header(f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}", data)


def numpy_header(text: str, data: bytes = b"\0" * 8) -> bytes:
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


OTHER_LIES: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "npy of objects": ("a.npy", numpy_file("(4,)", "|O"), {}),
    "npy of floats": ("a.npy", numpy_file("(2,)", "<f4"), {}),
    "npy of big-endian ids": ("a.npy", numpy_file("(4,)", ">u2"), {}),
    "npy cut off": ("a.npy", numpy_file("(5,)"), {}),
    "npy of 2^60 ids": ("a.npy", numpy_file(f"({2**60},)"), {}),
    "npy of a negative shape": ("a.npy", numpy_file("(-4,)"), {}),
    "npy in Fortran order": ("a.npy", numpy_file("(2, 2)", order="True"), {}),
    "npy with code for a shape": ("a.npy", numpy_file("__import__('os').getpid()"), {}),
    "npy with an open parenthesis": ("a.npy", numpy_header("{'descr': ('<u2', 'fortran"), {}),
    "npy with an open string": ("a.npy", numpy_header("{'descr': '''<u2"), {}),
    "npy with many parentheses": ("a.npy", numpy_header("(" * 9000), {}),
    "npy with a truth value for a size": ("a.npy", numpy_file("(True,)"), {}),
    "npy with keys of two types": ("a.npy", numpy_header("{1: 2, 'descr': 3}"), {}),
    "npy with a list as key": ("a.npy", numpy_header("{[]: 2}"), {}),
    "no npy": ("a.npy", b"PK\x03\x04 and more bytes", {}),
    "empty npy": ("a.npy", b"", {}),
    "llm.c cut off": ("a.bin", llmc_header(10) + b"\0" * 18, {}),
    "llm.c with a negative count": ("a.bin", llmc_header(-1), {}),
    "half a token": ("a.bin", b"\1\0\2", {"format": "tokens"}),
    "a .bin without anything": ("a.bin", b"\1\0\2\0", {}),
    "a .ds without an index": ("a.ds", b"\1\0\2\0", {}),
}


@pytest.mark.parametrize("name", OTHER_LIES)
def test_another_file_that_lies_is_one_line(tmp_path: Path, store_of: Callable[..., TokenStore], name: str) -> None:
    ending, content, options = OTHER_LIES[name]
    (tmp_path / ending).write_bytes(content)
    with pytest.raises(UserError, match=rf"^[^\n]*/{ending}: [^\n]+$"):
        store_of(tmp_path / ending, **options)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_of_an_index_is_one_line_or_documents_of_the_file(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes an index has: a ``UserError``, or documents that are made of the file's tokens."""
    write, name = data.draw(st.sampled_from([(megatron, "a.idx"), (datatrove, "a.ds.index")]))
    path = write(tmp_path, DOCUMENTS)
    raw = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    (tmp_path / name).write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    found: list[int] = []
    try:
        for piece in cut(Local(nameOrPath=str(path)).files()[0], ReadOptions()):
            for document in read(piece, ReadOptions()):
                found += document.tolist()  # type: ignore[union-attr]
    except UserError:
        return
    assert found == ALL
