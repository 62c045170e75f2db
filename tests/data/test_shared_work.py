"""One dataset that several processes tokenize into the same cache, and `max_tokens`, which ends it early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data.reading import cut as cutting
from pretrain.data.reading import units
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization import shared_work, tokenize
from pretrain.data.tokenization.encode import Encoder
from pretrain.data.tokenization.tokenize import prepare
from pretrain.runtime.errors import UserError
from tests.data.conftest import EOT
from tests.data.test_tokenize import IN_PROCESS, IN_WORKERS, finish, start
from tests.data.texts import parts_of, some_text

StoreOf = Callable[..., TokenStore]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 1000)
    monkeypatch.setattr(cutting, "UNIT_BYTES", 4000)
    monkeypatch.setattr(shared_work, "POLL_SECONDS", 0.005)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some twenty units in three files."""
    (tmp_path / "texts").mkdir()
    for number in range(3):
        lines = [json.dumps({"text": some_text(100 * number + i, 30 + i)}) for i in range(70)]
        (tmp_path / "texts" / f"{number}.jsonl").write_text("\n".join(lines))
    old = time.time() - 100
    for path in (tmp_path / "texts").iterdir():
        os.utime(path, (old, old))
    return tmp_path / "texts"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The units that are encoded."""
    found: list[Any] = []
    encode = Encoder.encode

    def counting(self: Encoder, unit: Any, progress: Any) -> Any:
        found.append(unit)
        return encode(self, unit, progress)

    monkeypatch.setattr(Encoder, "encode", counting)
    return found


def at_once(number: int, work: Callable[[int], Any]) -> list[Any]:
    """Run ``work`` in threads, each of which has its own locks as a process has."""
    found: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda i=i: found.setdefault(i, work(i))) for i in range(number)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[i] for i in range(number)]


def test_each_unit_is_encoded_by_one_of_them(
    folder: Path, tokenizer_json: str, tmp_path: Path, encoded: list[Any]
) -> None:
    alone = prepare(Local(nameOrPath=str(folder)), tokenizer_json=tokenizer_json, eot=EOT, cache=tmp_path / "alone")
    number = len(alone.parts)
    assert len(encoded) == number > 12
    encoded.clear()
    cache = tmp_path / "shared"
    stores = at_once(
        3, lambda _: prepare(Local(nameOrPath=str(folder)), tokenizer_json=tokenizer_json, eot=EOT, cache=cache)
    )
    assert len(encoded) == number
    assert parts_of(cache) == parts_of(tmp_path / "alone")
    assert len({store.path for store in stores}) == 1
    assert [part.path.name for part in stores[0].parts] == [part.path.name for part in alone.parts]
    assert not list(cache.glob("progress/*"))


def test_what_was_recorded_is_not_read_again(
    folder: Path, tokenizer_json: str, cache: Path, encoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a start that was stopped: by an error in the fifth unit, which stands for a kill."""
    source = Local(nameOrPath=str(folder))
    encode = Encoder.encode

    def failing(self: Encoder, unit: Any, progress: Any) -> Any:
        if len(encoded) == 5:
            raise KeyboardInterrupt
        return encode(self, unit, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tokenizer_json=tokenizer_json, eot=EOT)
    assert len(list(cache.glob("progress/*/*/*.json"))) == 5
    done = list(encoded)
    encoded.clear()
    store = prepare(source, tokenizer_json=tokenizer_json, eot=EOT)
    assert len(encoded) == len(store.parts) - 5
    assert not {unit.pieces[0].start for unit in encoded if unit.pieces[0].path == done[0].pieces[0].path} & {
        unit.pieces[0].start for unit in done
    }


def test_a_dead_holder_is_replaced_and_a_live_one_waited_for(
    folder: Path, tokenizer_json: str, tmp_path: Path, encoded: list[Any]
) -> None:
    """The lock of one unit is held while the others are encoded; what its holder has recorded is used."""
    source, cache = Local(nameOrPath=str(folder)), tmp_path / "cache"
    holding, taken = threading.Event(), []
    lock_of = shared_work.UnitRecords.lock

    def lock(self: Any, unit: Any) -> Any:
        found = lock_of(self, unit)
        if threading.current_thread().name == "holder" and found is not None:
            taken.append((unit, found))
            holding.set()
            time.sleep(0.3)
            raise RuntimeError("the holder dies")
        return found

    shared_work.UnitRecords.lock = lock  # type: ignore[method-assign]
    try:

        def hold() -> None:
            with pytest.raises(RuntimeError):
                prepare(source, tokenizer_json=tokenizer_json, eot=EOT, cache=cache)
            taken[0][1].release()  # as the kernel does

        holder = threading.Thread(target=hold, name="holder")
        holder.start()
        assert holding.wait(10)
        store = prepare(source, tokenizer_json=tokenizer_json, eot=EOT, cache=cache)
        holder.join(10)
        assert not holder.is_alive()
    finally:
        shared_work.UnitRecords.lock = lock_of  # type: ignore[method-assign]
    assert encoded[-1].pieces[0].start == taken[0][0].pieces[0].start, "the held unit comes last"
    assert len(encoded) == len(store.parts)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [IN_PROCESS, IN_WORKERS])
def test_four_processes_of_which_one_is_killed(tokenizer_json: str, tmp_path: Path, threshold: int) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number}.txt").write_text(some_text(number, 30_000))
    finish(start(folder, tokenizer_json, tmp_path / "alone", IN_PROCESS))
    expected = parts_of(tmp_path / "alone")
    cache = tmp_path / "shared"
    processes = [start(folder, tokenizer_json, cache, threshold) for _ in range(4)]
    while len(parts_of(cache)) < 4:
        time.sleep(0.005)
        assert all(process.poll() is None for process in processes)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].communicate()
    assert len(parts_of(cache)) < 24
    outputs = [finish(process) for process in processes[1:]]
    assert len({output[0] for output in outputs}) == 1
    assert parts_of(cache) == expected
    opened = [int(output[1]) for output in outputs]
    assert threshold == IN_WORKERS or (min(opened) > 0 and sum(opened) <= 3 * 24 + 2 * 4), opened


# max_tokens ---------------------------------------------------------------------------------------------------------------


def documents_in(store: TokenStore) -> list[list[int]]:
    return [
        part.tokens[begin:end].tolist()
        for part in store.parts
        for begin, end in zip([0, *part.ends[:-1].tolist()], part.ends.tolist(), strict=True)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> tuple[Path, list[list[int]]]:
    """A folder of 60 small documents, and their tokens."""
    folder = tmp_path_factory.mktemp("limited")
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(some_text(number, 1 + number * 7 % 90))
    store = prepare(Local(nameOrPath=str(folder)), tokenizer_json=tokenizer_json, eot=EOT, cache=folder / ".cache")
    return folder, documents_in(store)


@given(limit=st.integers(1, 9000), size=st.integers(50, 3000), workers=st.integers(1, 3))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_max_tokens_keeps_the_first_documents(
    whole: tuple[Path, list[list[int]]], tokenizer_json: str, limit: int, size: int, workers: int
) -> None:
    """Whatever the units and the number of processes: the longest prefix of complete documents, at least one."""
    folder, documents = whole
    total = np.cumsum([len(document) for document in documents])
    expected = documents[: max(1, int(np.searchsorted(total, limit, "right")))]
    source = Local(nameOrPath=str(folder), max_tokens=limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "OWN_UNIT_BYTES", size)
        patch.setattr(units, "UNIT_BYTES", size)
        cache = folder / f".cache-{limit}-{size}-{workers}"
        stores = at_once(workers, lambda _: prepare(source, tokenizer_json=tokenizer_json, eot=EOT, cache=cache))
    assert all(documents_in(store) == expected for store in stores)
    assert len({store.path for store in stores}) == 1


def test_max_tokens_reads_no_more_than_it_needs(folder: Path, store_of: StoreOf, encoded: list[Any]) -> None:
    (folder / "9.jsonl").write_text("this is not read")
    store = store_of(folder, max_tokens=5000)
    assert 4500 < store.num_tokens <= 5000
    assert len(encoded) < 8
    assert {unit.pieces[0].path for unit in encoded} == {str(folder / "0.jsonl")}
    again = store_of(folder, max_tokens=5000)
    assert again.path == store.path
    with pytest.raises(UserError, match="broken JSON"):
        store_of(folder)


def characters(tokenizer_json: str) -> str:
    """Return a tokenizer with a token per byte."""
    content = json.loads(tokenizer_json)
    content["model"]["merges"] = []
    return json.dumps(content)


def test_max_tokens_after_a_start_that_needed_less_of_a_file(
    folder: Path, tokenizer_json: str, tmp_path: Path, encoded: list[Any]
) -> None:
    """Another tokenizer with the same cache, or an earlier file that shrank, needs more pieces than the last start read."""
    source = Local(nameOrPath=str(folder), max_tokens=20_000)

    def documents(tokenizer: str, cache: str) -> list[list[int]]:
        return documents_in(prepare(source, tokenizer_json=tokenizer, eot=EOT, cache=tmp_path / cache))

    expected = documents(tokenizer_json, "alone")
    documents(characters(tokenizer_json), "shared")
    assert documents(tokenizer_json, "shared") == expected
    encoded.clear()
    assert documents(tokenizer_json, "shared") == expected
    assert not encoded, "the pieces of the last file are known, so that they are not read again"
    first = folder / "0.jsonl"
    first.write_text(first.read_text().splitlines()[0])
    os.utime(first, (time.time() - 50,) * 2)
    assert documents(tokenizer_json, "shared") == documents(tokenizer_json, "after")


def test_max_tokens_in_worker_processes(
    folder: Path, store_of: StoreOf, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    limited = store_of(folder, max_tokens=5000)
    monkeypatch.setattr(tokenize, "WORKERS_FROM_BYTES", 1)
    monkeypatch.setenv("PRETRAIN_CACHE", str(cache.with_name("other")))
    assert [part.path.name for part in store_of(folder, max_tokens=5000, num_workers=2).parts] == [
        part.path.name for part in limited.parts
    ]


def test_the_module_of_the_workers_is_light() -> None:
    heavy = "import sys, pretrain.data.tokenization.workers; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "set()"
