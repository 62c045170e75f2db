"""A folder that several ranks write becomes one at once, or leaves no trace; what the marker says of it is what is there."""

import errno
import json
import os
from dataclasses import dataclass, field

import pytest
from safetensors import SafetensorError

from pretrain.checkpoint import atomic
from pretrain.checkpoint.atomic import write_folder
from pretrain.checkpoint.marker import incomplete_reason
from pretrain.distributed.context import DistributedContext
from pretrain.runtime.errors import NoRoom, UserError
from pretrain.runtime.folders import MARKER

ALONE = DistributedContext()


@dataclass
class OneOfTwo:
    """Rank ``rank`` of two; what the other one found is in ``other``."""

    rank: int
    other: list = field(default_factory=list)
    size: int = 2

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather_object(self, work):
        return [work(), *self.other]

    def on_main_rank(self, work):
        return work() if self.is_main else None


def hint() -> str:
    return "the hint"


def fill(fresh):
    (fresh / "code").mkdir()
    files = [fresh / "a.txt", fresh / "code" / "b.txt"]
    for file, text in zip(files, ("eight by", "12345"), strict=True):
        file.write_text(text)
    return files


def test_what_is_written_and_said(tmp_path):
    heard = []
    size = write_folder(tmp_path / "x/y", fill, world=ALONE, hint=hint, alive=lambda: heard.append(1))
    assert size == 13
    assert len(heard) == 2
    assert incomplete_reason(tmp_path / "x/y", verify="full") is None
    marker = json.loads((tmp_path / "x/y" / MARKER).read_text())
    assert {name: entry["bytes"] for name, entry in marker["files"].items()} == {"a.txt": 8, "code/b.txt": 5}
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["y"]


def test_without_a_marker(tmp_path, monkeypatch):
    """Nothing is read again to be added up."""
    monkeypatch.setattr(atomic, "entry_of", pytest.fail)
    assert write_folder(tmp_path / "y", fill, world=ALONE, hint=hint, marker=False) == 13
    assert sorted(p.name for p in (tmp_path / "y").rglob("*")) == ["a.txt", "b.txt", "code"]


def test_the_parts_of_all_ranks_are_in_the_marker(tmp_path):
    entry = {"bytes": 100, "xxh3_128": "0" * 32}
    size = write_folder(tmp_path / "y", fill, world=OneOfTwo(0, [{"c.txt": entry}]), hint=hint)
    assert size == 113
    assert json.loads((tmp_path / "y" / MARKER).read_text())["files"]["c.txt"] == entry


def test_another_rank_only_fills(tmp_path):
    """The first one has made the folder, and takes it away after an error."""
    (tmp_path / "y.partial").mkdir()
    assert write_folder(tmp_path / "y", fill, world=OneOfTwo(1), hint=hint) == 13
    assert [p.name for p in tmp_path.iterdir()] == ["y.partial"]

    def fail(fresh):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "y", fail, world=OneOfTwo(1), hint=hint)
    assert [p.name for p in tmp_path.iterdir()] == ["y.partial"]


def test_what_a_kill_has_left_is_no_part_of_it(tmp_path):
    (tmp_path / "y.partial").mkdir()
    (tmp_path / "y.partial" / "old").touch()
    write_folder(tmp_path / "y", fill, world=ALONE, hint=hint)
    assert sorted(p.name for p in (tmp_path / "y").iterdir()) == [MARKER, "a.txt", "code"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "full"), NoRoom),
        (OSError(errno.EDQUOT, "quota"), NoRoom),
        (OSError(errno.EACCES, "no"), UserError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), NoRoom),
        (SafetensorError("I/O error: (os error 122)"), NoRoom),
        (SafetensorError("I/O error: (os error 13)"), UserError),
    ],
)
def test_what_keeps_it_from_being_written(error, kind, tmp_path):
    def fail(fresh):
        (fresh / "a").touch()
        raise error

    with pytest.raises(UserError) as found:
        write_folder(tmp_path / "y", fail, world=ALONE, hint=hint)
    assert type(found.value) is kind
    assert str(found.value) == f"{tmp_path / 'y'} could not be written: {error}; the hint"
    assert found.value.__cause__ is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_modes_of_any_other(mask, mode, tmp_path):
    def private(fresh):
        (fresh / "a").touch(mode=0o600)
        return [fresh / "a"]

    atomic._umask.cache_clear()
    before = os.umask(mask)
    try:
        write_folder(tmp_path / "y", private, world=ALONE, hint=hint)
        assert os.umask(mask) == mask, "left as it was"
    finally:
        os.umask(before)
        atomic._umask.cache_clear()
    assert (tmp_path / "y" / "a").stat().st_mode & 0o777 == mode
