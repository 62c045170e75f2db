"""What reading costs, in bytes and opened files and not in seconds: each byte a few times, however large the file is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from formats import WRITERS, documents_of
from texts import some_text

from pretrain.data.reading import cut, json_records, records
from pretrain.data.reading.readers import digest, read
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import by_value

IO = Path("/proc/self/io")
UNIT_BYTES = 50_000
needs_io = pytest.mark.skipif(not IO.exists(), reason="counts bytes in /proc/self/io: Linux")
opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)


def bytes_read() -> int:
    """By this process since it began, through whatever library."""
    return int(IO.read_text().split()[1])


def cost(path: Path) -> tuple[float, float]:
    """(bytes read per byte of the file, files opened per piece) of what ``prepare`` does with a file: cut, digest, read."""
    source = Local(nameOrPath=str(path))
    (file,), options = source.files(), source.options()
    del opened[:]
    before = bytes_read()
    pieces = cut.cut(file, options)
    for piece in pieces:
        digest(piece, options)
        assert all(read(piece, options))
    after = bytes_read()
    return (after - before) / path.stat().st_size, opened.count(str(path)) / len(pieces)


@needs_io
@pytest.mark.parametrize("ending", [*WRITERS, "txt"])
def test_a_file_is_read_a_few_times_whatever_its_size(ending: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cut, "UNIT_BYTES", UNIT_BYTES)
    monkeypatch.setattr(cut, "TEXT_WINDOW_BYTES", UNIT_BYTES // 8)
    monkeypatch.setattr(cut, "FIRST_WINDOW_BYTES", UNIT_BYTES // 16)
    found = []
    for count in (400, 2400):
        texts = [some_text(seed, 40) for seed in range(count)]
        path = tmp_path / f"{count}.{ending}"
        path.write_bytes(WRITERS[ending](texts) if ending != "txt" else "\n".join(texts).encode())
        assert ending == "txt" or documents_of(path) == texts
        found.append(cost(path))
    (few, few_opened), (many, many_opened) = found
    assert many < 1.05 * few + 0.1
    assert many < 4, "cut, digest and documents, each once, and of a piece's buffers the rest"
    assert many_opened <= max(few_opened, 5)


@pytest.mark.parametrize("kind", ["one record", "many records"])
def test_json_is_parsed_in_linear_time(kind: str, tmp_path: Path, monkeypatch) -> None:
    """Counted: the text that is put together, and the text of a record that is parsed again as more of it is read."""
    monkeypatch.setattr(records, "BLOCK_BYTES", 1000)
    texts = ["some text " * 100_000] if kind == "one record" else ["some text"] * 30_000
    path = tmp_path / "a.json"
    path.write_bytes(WRITERS["json"](texts))
    joined, parsed = [], []
    read_on, decode = json_records._Window._read_on, json.JSONDecoder.raw_decode

    def counted_read(window: json_records._Window) -> bool:
        more = read_on(window)
        joined.append(len(window.text))
        return more

    def counted_decode(self: json.JSONDecoder, text: str, at: int = 0) -> object:
        try:
            found = decode(self, text, at)
            parsed.append(found[1] - at)
        except ValueError:
            parsed.append(len(text) - at)
            raise
        return found

    monkeypatch.setattr(json_records._Window, "_read_on", counted_read)
    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counted_decode)
    assert documents_of(path) == texts
    assert sum(joined) < 5 * path.stat().st_size
    assert sum(parsed) < 5 * path.stat().st_size


def test_groups_of_equal_values_are_found_in_one_sort() -> None:
    """Not by one comparison of all for every value: values and their number both grow with the corpus."""
    values = np.array([3, 1, 3, 2, 1, 3])
    assert [(value, where.tolist()) for value, where in by_value(values)] == [(1, [1, 4]), (2, [3]), (3, [0, 2, 5])]
    assert list(by_value(values[:0])) == []
