"""`python -m pretrain.tools.cache`: list, prune, verify; and a cache that was moved to another folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.reading import units
from pretrain.data.reading.opening import stamp_of
from pretrain.data.store.token_shards import PartWriter, open_part
from pretrain.data.store.token_store import TokenStore
from pretrain.runtime.errors import UserError
from pretrain.runtime.locks import Lock, alone, is_held
from pretrain.tools import cache as tool
from tests.data.texts import parts_of, some_text

StoreOf = Callable[..., TokenStore]
DAY = 86_400


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 1)


@pytest.fixture
def filled(tmp_path: Path, store_of: StoreOf, cache: Path) -> Path:
    """A cache with ``new`` and ``old``, which share one of their three parts; ``old`` was used 40 days ago."""
    for name, numbers in (("old", (0, 1, 2)), ("new", (2, 3, 4))):
        (tmp_path / name).mkdir()
        for number in numbers:
            (tmp_path / name / f"{number}.txt").write_text(some_text(number, 500))
        store = store_of(tmp_path / name)
        if name == "old":
            for path in (store.path, *(part.path for part in store.parts)):
                os.utime(path, (time.time() - 40 * DAY,) * 2)
        del store
    return cache


@pytest.fixture
def run(
    filled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    def start(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cache", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_code:
            tool.main()
        found = capsys.readouterr()
        return int(exit_code.value.code or 0), found.out + found.err

    return start


def test_list(run: Callable[..., tuple[int, str]], filled: Path) -> None:
    code, out = run()
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert [(line[0], line[-1]) for line in lines[1:3]] == [("3", "new"), ("3", "old")]
    assert lines[2][-4:-1] == ["40", "d", "ago"]
    assert "parts of no dataset: 0" in out
    assert str(filled) in out


def test_prune_by_age(run: Callable[..., tuple[int, str]], filled: Path, store_of: StoreOf, tmp_path: Path) -> None:
    before = parts_of(filled)
    code, out = run("prune", "--older-than", "30")
    assert code == 0
    assert "would be deleted: old, used 40 days ago, 2 parts" in out
    assert parts_of(filled) == before
    code, out = run("prune", "--older-than", "30", "--delete")
    assert out.startswith("deleted: old, used 40 days ago, 2 parts")
    assert len(parts_of(filled)) == 3
    assert store_of(tmp_path / "new").num_documents == 3, "it has all of its parts, also the shared one"
    assert store_of(tmp_path / "old").num_documents == 3
    assert parts_of(filled) == before
    assert run("prune", "--older-than", "30")[1] == "nothing to delete\n"


def test_prune_by_size(run: Callable[..., tuple[int, str]], filled: Path) -> None:
    sizes = {path: path.stat().st_size for path in filled.glob("parts/*/*.tokens")}
    three = (sum(sizes.values()) - min(sizes.values())) / 1e9
    assert "would be deleted: old" in run("prune", "--max-size", str(three))[1]
    assert run("prune", "--max-size", "1")[1] == "nothing to delete\n"
    out = run("prune", "--max-size", "0")[1]
    assert out.index("deleted: old") < out.index("deleted: new"), "the one that was used last goes last"
    run("prune", "--max-size", "0", "--delete")
    assert not parts_of(filled)


def test_what_no_run_uses(run: Callable[..., tuple[int, str]], filled: Path, tmp_path: Path) -> None:
    """A run names its datasets; one of an earlier version names only the files that it has read."""
    manifests = {json.loads(path.read_text())["name"]: path.name for path in filled.glob("stores/*.json")}
    runs = tmp_path / "runs"
    (runs / "sweep/a").mkdir(parents=True)
    (runs / "sweep/a/tokens.json").write_text(json.dumps([manifests["new"]]))
    code, out = run("--runs", str(runs))
    assert code == 0
    lines = out.splitlines()
    assert lines[1].endswith(f"new (used by {runs}/sweep/a)")
    assert lines[2].endswith("old (used by no run)")
    for limits in ((), ("--older-than", "0"), ("--max-size", "0")):
        out = run("prune", "--runs", str(runs), *limits)[1]
        assert "would be deleted: old" in out
        assert "deleted: new" not in out
    assert run("prune", "--runs", str(runs), "--older-than", "50")[1] == "nothing to delete\n"
    (runs / "b").mkdir()
    (runs / "b/config.yaml").write_text("{}")
    read = {str(tmp_path / f"old/{number}.txt"): [[1, 2, 3], "x"] for number in range(3)}
    (runs / "b/data.json").write_text(json.dumps(read))
    assert run("prune", "--runs", str(runs))[1] == "nothing to delete\n"
    (runs / "b/data.json").write_text(json.dumps(dict([*read.items()][1:])))
    assert "deleted: old" in run("prune", "--runs", str(runs), "--delete")[1]
    assert len(parts_of(filled)) == 3


@pytest.mark.parametrize("content", ["{}", "[1]", "[", '{"a": 1}'])
def test_a_run_that_does_not_tell_what_it_uses(
    content: str, run: Callable[..., tuple[int, str]], filled: Path, tmp_path: Path
) -> None:
    """Nothing is deleted then."""
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/tokens.json").write_text(content)
    code, out = run("prune", "--runs", str(tmp_path / "runs"), "--delete")
    assert (code, out.count("\n")) == (2, 1)
    assert out.startswith(f"error: {tmp_path}/runs/a/tokens.json: can't be read")
    code, out = run("prune", "--runs", str(tmp_path / "nowhere"))
    assert (code, out) == (2, f"error: --runs: {tmp_path}/nowhere: No such file or directory\n")
    assert len(parts_of(filled)) == 5


def test_what_is_in_use_stays(
    run: Callable[..., tuple[int, str]], filled: Path, store_of: StoreOf, tmp_path: Path
) -> None:
    store = store_of(tmp_path / "old")
    os.utime(store.path, (time.time() - 40 * DAY,) * 2)
    assert "old (in use)" in run()[1]
    assert run("prune", "--older-than", "30", "--max-size", "0", "--delete")[1].count("deleted") == 1
    assert len(parts_of(filled)) == 3
    assert store.parts[0].tokens.sum() > 0
    del store
    assert "deleted: old" in run("prune", "--older-than", "30", "--delete")[1]


def test_parts_of_no_dataset(run: Callable[..., tuple[int, str]], filled: Path) -> None:
    """They may be those of a start that was interrupted: they are kept for a week, and while a dataset is being tokenized."""
    for manifest in filled.glob("stores/*.json"):
        manifest.unlink()
    assert "parts of no dataset: 5" in run()[1]
    (filled / "progress/x/y").mkdir(parents=True)
    lock = Lock(filled / "progress/x/y/z.lock").acquire()
    assert "nothing is deleted: a dataset is being tokenized" in run("prune", "--older-than", "1", "--delete")[1]
    lock.release()
    for path in (filled / "progress/x/y", filled / "progress/x"):
        os.utime(path, (time.time() - 40 * DAY,) * 2)
    out = run("prune", "--older-than", "1", "--delete")[1]
    assert "deleted: 4 parts and folders of no dataset, older than 7 days" in out
    assert len(parts_of(filled)) == 2
    assert not list(filled.glob("progress/*"))


def age(*paths: Path) -> None:
    for path in paths:
        os.utime(path, (time.time() - 40 * DAY,) * 2)


@pytest.mark.parametrize("place", ["cache/../cache", "alias", "moved"])
def test_parts_in_use_whatever_the_name_of_the_cache(
    place: str, run: Callable[..., tuple[int, str]], filled: Path, tmp_path: Path
) -> None:
    """Lists of earlier versions have absolute paths, which may be those of a link to the cache or of another place."""
    for path in filled.glob("stores/*.json"):
        content = json.loads(path.read_text())
        if place != "cache/../cache":
            content["parts"] = [str(tmp_path / place / part) for part in content["parts"]]
        path.write_text(json.dumps(content))
    age(*filled.glob("parts/*/*.tokens"))
    named = filled / ".." / filled.name if ".." in place else filled
    (tmp_path / "alias").symlink_to(filled)
    assert run("prune", "--older-than", "30", "--delete", "--cache", str(named)) == (0, "nothing to delete\n")
    assert len(parts_of(filled)) == 5
    age(*filled.glob("stores/*.json"))
    assert ", 3 parts, " in run("prune", "--older-than", "30", "--delete", "--cache", str(named))[1]
    assert not parts_of(filled)


def test_no_dataset_is_deleted_during_a_tokenization(run: Callable[..., tuple[int, str]], filled: Path) -> None:
    """It may use parts of a list that it does not use."""
    before = parts_of(filled)
    (filled / "progress/x/y").mkdir(parents=True)
    out = run("prune", "--older-than", "30", "--max-size", "0", "--delete")[1]
    assert out.startswith("nothing is deleted: a dataset is being tokenized")
    assert parts_of(filled) == before
    assert len(list(filled.glob("stores/*.json"))) == 2


def test_a_dataset_that_a_run_opens_meanwhile(filled: Path, store_of: StoreOf, tmp_path: Path) -> None:
    """The run has opened its list after the datasets were chosen."""
    cache = tool.Cache(filled)
    found = tool.chosen(cache, older_than=None, max_bytes=0)
    assert [dataset.name for dataset in found] == ["old", "new"]
    store = store_of(tmp_path / "old")
    lines = [*tool.prune(cache, found, older_than=None, delete=True)]
    assert lines[0] == "kept: old: a process uses it"
    assert ", 2 parts, " in lines[1]
    assert all(part.tokens.sum() > 0 for part in store.parts)
    assert len(parts_of(filled)) == 3


def test_a_store_waits_for_the_deletion_of_its_list(filled: Path, store_of: StoreOf, tmp_path: Path) -> None:
    path = store_of(tmp_path / "old").path
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            TokenStore(path)
        except UserError as error:
            failures.append(error)

    with alone(path) as is_mine:
        assert is_mine
        thread = threading.Thread(target=open_it)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        path.unlink()
    thread.join()
    assert "has lost files since it was filled; run the same command again" in str(failures[0])


def test_a_probe_leaves_no_store_without_its_lock(filled: Path, store_of: StoreOf, tmp_path: Path) -> None:
    path, stores = store_of(tmp_path / "old").path, []
    with alone(path):
        thread = threading.Thread(target=lambda: stores.append(TokenStore(path)))
        thread.start()
        thread.join(0.1)
    thread.join()
    assert is_held(path)
    stores.clear()
    assert not is_held(path)


def test_copies_of_documents(run: Callable[..., tuple[int, str]], filled: Path) -> None:
    """They are deleted by the time of their last use, and not to make room."""
    for name in ("documents/a", "huggingface/b"):
        (filled / name).mkdir(parents=True)
        (filled / name / "1.jsonl").write_text("{}")
        age(filled / name)
    assert run("prune", "--max-size", "200", "--delete") == (0, "nothing to delete\n")
    assert "deleted: 2 parts and folders" in run("prune", "--older-than", "20", "--delete")[1]
    assert not [*filled.glob("documents/*"), *filled.glob("huggingface/*")]


def test_near_files_are_counted_and_deleted_with_their_parts(
    run: Callable[..., tuple[int, str]], filled: Path, store_of: StoreOf, tmp_path: Path
) -> None:
    store = store_of(tmp_path / "old")
    store.kept("near")
    age(store.path)
    del store
    assert len(list(filled.glob("near/*/*.keys"))) == 3
    keys = sum(path.stat().st_size for path in filled.glob("near/*/*.keys"))
    cache = tool.Cache(filled)
    old = cache.datasets[-1]
    assert cache.size(old) == sum(path.stat().st_size for path in old.parts) + keys
    run("prune", "--older-than", "30", "--delete")
    assert len(list(filled.glob("near/*/*.keys"))) == 1, "those of the shared part"
    assert not list(filled.glob("near/*.kept"))


def test_verify_of_tokens_in_place(
    run: Callable[..., tuple[int, str]], filled: Path, store_of: StoreOf, tmp_path: Path
) -> None:
    """A part is judged by its own bytes: the file with its tokens may be on a disk that is not mounted now."""
    source = tmp_path / "tokens.bin"
    source.write_bytes(b"\1\0" * 5)
    path = filled / "parts/ab/in_place.tokens"
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        writer = PartWriter(file, np.dtype(np.uint16))
        writer.refer(5, digest=1, size=-1, piece=0, index=0)
        writer.finish({"tokens_at": [str(source), 0, *stamp_of(str(source))]})
    assert open_part(path) is not None
    os.utime(source, (0, 0))
    assert open_part(path) is None
    assert run("verify", "--delete") == (0, "0 of 6 parts damaged\n")
    source.unlink()
    assert run("verify", "--delete") == (0, "0 of 6 parts damaged\n")
    path.write_bytes(b"\0" + path.read_bytes()[1:-1])
    assert run("verify", "--delete") == (1, f"damaged: {path}\n1 of 6 parts damaged\n")
    assert not path.exists()


def test_verify_keeps_what_is_in_use(
    run: Callable[..., tuple[int, str]], filled: Path, store_of: StoreOf, tmp_path: Path
) -> None:
    store = store_of(tmp_path / "old")
    path = store.parts[0].path
    path.write_bytes(path.read_bytes()[:10] + b"??" + path.read_bytes()[12:])
    line = f"damaged: {path} (kept: a process uses it)\n"
    assert run("verify", "--delete") == (1, line + "1 of 5 parts damaged\n")
    assert path.exists()
    del store
    cache = tool.Cache(filled)
    path.unlink()  # by another process
    assert tool.verify(cache, delete=True) == (0, [])


def test_verify(run: Callable[..., tuple[int, str]], filled: Path, store_of: StoreOf, tmp_path: Path) -> None:
    assert run("verify") == (0, "0 of 5 parts damaged\n")
    path = next(filled.glob("parts/*/*.tokens"))
    before, raw = path.read_bytes(), bytearray(path.read_bytes())
    raw[10] ^= 1
    path.write_bytes(raw)
    assert run("verify", "--delete") == (1, f"damaged: {path}\n1 of 5 parts damaged\n")
    assert not path.exists()
    for name in ("old", "new"):
        store_of(tmp_path / name)
    assert path.read_bytes() == before


def test_mistakes(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    assert run("prune") == (2, "error: prune needs --older-than DAYS, --max-size GB or --runs FOLDER\n")
    assert run("prune", "--older-than", "-1") == (2, "error: --older-than and --max-size must be at least 0\n")
    assert run("prune", "--max-size", "nan") == (2, "error: --older-than and --max-size must be at least 0\n")
    assert run("--cache", str(tmp_path)) == (
        2,
        f"error: {tmp_path}: not a token cache; set PRETRAIN_CACHE or --cache\n",
    )


def test_a_hostile_manifest(run: Callable[..., tuple[int, str]], filled: Path, tmp_path: Path) -> None:
    """Nothing outside of the cache is deleted, and the terminal is not written to."""
    (tmp_path / "precious.tokens").write_text("x")
    for number, content in enumerate(
        (
            {
                "name": "a\x1b[2J",
                "parts": ["../../precious.tokens", str(tmp_path / "precious.tokens"), "parts/../../x", 5],
            },
            {"name": "b\x1b[2J", "parts": ["../precious.tokens", "parts/aa/../../../precious.tokens"]},
            ["not a manifest"],
        )
    ):
        (filled / f"stores/{number}.json").write_text(json.dumps(content))
        os.utime(filled / f"stores/{number}.json", (0, 0))
    (filled / "stores/link.json").symlink_to(tmp_path / "precious.tokens")
    (filled / "documents").mkdir()
    (filled / "documents/link").symlink_to(tmp_path)
    code, out = run()
    assert code == 0
    assert "\x1b" not in out
    run("prune", "--max-size", "0", "--older-than", "0", "--delete")
    assert (tmp_path / "precious.tokens").exists()
    assert (tmp_path / "old/0.txt").exists()
    assert len(parts_of(filled)) == 5
    for name in ("0", "1", "2", "link"):
        out = run("prune", "--max-size", "0", "--delete")[1]
        assert out.startswith(f"nothing is deleted: {filled}/stores/{name}.json is not a list of parts")
        (filled / f"stores/{name}.json").unlink()
    run("prune", "--max-size", "0", "--older-than", "0", "--delete")
    assert not parts_of(filled)
    assert (tmp_path / "precious.tokens").exists()


def test_a_moved_cache(filled: Path, store_of: StoreOf, tmp_path: Path) -> None:
    """A copy on another machine is used as it is; manifests of earlier versions, with absolute paths, are read too."""
    store = store_of(tmp_path / "new")
    shutil.copytree(filled, tmp_path / "elsewhere")
    expected = [part.tokens.tolist() for part in store.parts]
    manifest = json.loads(store.path.read_text())
    assert all(not os.path.isabs(part) for part in manifest["parts"])
    manifest["parts"] = [str(filled / part) for part in manifest["parts"]]
    (filled / "stores/earlier.json").write_text(json.dumps(manifest))
    assert [part.tokens.tolist() for part in TokenStore(filled / "stores/earlier.json").parts] == expected
    (filled / "stores/earlier.json").unlink()
    shutil.rmtree(filled)
    moved = TokenStore(tmp_path / "elsewhere/stores" / store.path.name)
    assert [part.tokens.tolist() for part in moved.parts] == expected
