"""Files and folders are written completely or not at all, while other processes may do the same."""

import multiprocessing
import os

import pytest

from pretrain.runtime import filesystem
from pretrain.runtime.files import (
    atomic_file,
    begin_folder,
    finish_folder,
    make_folder,
    open_append,
    partial_of,
    remove_folder,
    remove_leftovers,
    replace_file,
    write_files,
)


def test_every_file_and_process_has_a_partial_of_its_own(tmp_path):
    json, html = tmp_path / "sweep.json", tmp_path / "sweep.html"
    assert len({partial_of(json), partial_of(html), partial_of(json, process=1)}) == 3


def test_a_process_that_fails_takes_away_only_its_own(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    theirs = partial_of(path, process=1)
    theirs.write_text("half")
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace_file(path, "new")
    assert list(tmp_path.iterdir()) == [theirs]


def rewrite(path):
    for number in range(500):
        replace_file(path, f"{number}" * 100)


def test_processes_that_write_one_file(tmp_path):
    writers = [multiprocessing.get_context("fork").Process(target=rewrite, args=(tmp_path / "a",)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["a"]


def test_what_fails_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    replace_file(path, b"\xff old")

    def write():
        with atomic_file(path, flush=True) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_bytes() == b"\xff old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_several_names_is_not_changed_under_the_others(tmp_path):
    (tmp_path / "a").write_text("1")
    os.link(tmp_path / "a", tmp_path / "b")
    with open_append(tmp_path / "b", mode="ab") as file:
        file.write(b"2")
    assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["1", "12"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_appears_at_once_and_goes_at_once(tmp_path):
    path = tmp_path / "deep" / "step-1"
    fresh = begin_folder(path)
    (fresh / "left").touch()
    fresh = begin_folder(path)  # a killed process had begun it
    assert write_files({"a": b"1", "code/b": b"2"}, fresh) == [fresh / "a", fresh / "code" / "b"]
    assert not path.exists()
    finish_folder(path)
    assert sorted(p.name for p in path.rglob("*")) == ["a", "b", "code"]
    remove_folder(path)
    assert os.listdir(path.parent) == []


def test_only_leftovers_of_the_pattern_are_deleted(tmp_path):
    for name in ("step-1.partial", "step-2.removed", "step-3.replaced", "step-4", "mine.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_leftovers(tmp_path, "step-*")
    assert sorted(os.listdir(tmp_path)) == ["mine.partial", "step-4"]


def test_folders_on_the_way_are_made_and_may_be_there(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(filesystem, "flush", flushed.append)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert flushed == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2
    answers = iter([False, True, True])  # another rank was faster, after this one had looked
    monkeypatch.setattr(type(tmp_path), "is_dir", lambda path: next(answers))
    make_folder(tmp_path / "a")


def test_the_older_one_goes_last(tmp_path, monkeypatch):
    new, path, old = tmp_path / "x.partial", tmp_path / "x", tmp_path / "x.replaced"
    for folder, name in ((new, "n"), (path, "o"), (old, "left")):
        folder.mkdir()
        (folder / name).touch()
    (new / "code").mkdir()
    seen = []
    keep = filesystem.move
    monkeypatch.setattr(filesystem, "move", lambda a, b: seen.append((a.name, b.name)) or keep(a, b))
    monkeypatch.setattr(filesystem, "flush", lambda p: seen.append((p.name, sorted(f.name for f in old.iterdir()))))
    finish_folder(path)
    flushed = [("code", ["left"]), ("x.partial", ["left"])]
    assert seen == [*flushed, ("x", "x.replaced"), ("x.partial", "x"), (tmp_path.name, ["o"])]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert sorted(p.name for p in path.iterdir()) == ["code", "n"]
