"""A file that is rewritten whole, while other processes may do the same."""

import multiprocessing
import os

import pytest

from pretrain.runtime.atomic_files import partial_of, replace_file


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
