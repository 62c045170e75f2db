"""Which checkpoints go, when, and what is said where one can't be written, moved or removed."""

import errno
import json
import shutil
from dataclasses import dataclass

import pytest
import torch

from pretrain.checkpoint.atomic import write_folder
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.marker import entry_of, write_marker
from pretrain.checkpoint.store import SPARE_BYTES, CheckpointStore, bytes_of, load, losses_of
from pretrain.runtime.errors import UserError
from pretrain.runtime.folders import MARKER
from tests.checkpoint.test_store import ALONE, flip, saved_at, state

GIB = 1 << 30
ALL = CheckpointConfig(keep_last=None)


@pytest.fixture
def free(monkeypatch):
    """``free(folder, number)``: so many bytes are free there, of which the disk has ``total``."""

    def set_free(folder, number, total=1 << 40):
        def usage(path):
            assert path == folder
            return shutil._ntuple_diskusage(total, 0, number() if callable(number) else number)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return set_free


def evaluated(step: int, loss: float, digest: str | None = "one") -> dict:
    """The state of ``step``, evaluated there. ``digest=None``: of a version that kept none."""
    found = state(step)
    score = {"domain": "new", "role": "new", "loss": loss, "perplexity": 1.0, "bits_per_byte": None}
    scores = [score if digest is None else score | {"digest": digest}]
    found["progress"] |= {"evaluated_at": step, "scores": scores}
    return found


# Room ---------------------------------------------------------------------------------------------------------------


def test_the_room_that_a_checkpoint_needs(tmp_path, free):
    """That of its tensors, and some for the rest; to the byte. Where there is as much nothing is removed yet."""
    store = CheckpointStore(tmp_path / "checkpoints", ALL)
    for step in (1, 2):
        saved_at(store, step, state(step))
    tight = CheckpointStore(store.folder, CheckpointConfig(keep_last=1))
    free(store.folder, 3 * GIB + SPARE_BYTES)
    assert tight.make_room(3, 3 * GIB) is None
    assert store.steps() == [1, 2]
    assert tight.make_room(3, 3 * GIB + 1) is not None
    assert store.steps() == [2]
    assert bytes_of(state(1)) == 4 * 15 + 2 * 3 + 4 * 15 + 4


def test_without_room_it_says_what_is_missing(tmp_path, free):
    store = CheckpointStore(tmp_path / "checkpoints", ALL)
    free(store.folder, 3 * GIB // 2)
    says = f"{store.path(5)} could not be written: it needs 3.25 GiB, {store.folder} has 1.50 GiB free; "
    assert store.make_room(5, 13 * GIB // 4) == f"{says}there is no earlier checkpoint"
    for step in (3, 4):
        saved_at(store, step, state(step))
    assert store.make_room(5, 13 * GIB // 4) == f"{says}the last valid checkpoint is {store.path(4)}"
    assert store.steps() == [3, 4]


def test_a_disk_that_does_not_say_how_much_room_it_has(tmp_path, free):
    store = CheckpointStore(tmp_path)
    free(tmp_path, 0, total=0)
    assert store.make_room(1, 1 << 60) is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "checkpoints"
    with pytest.raises(UserError) as found:
        CheckpointStore(folder).make_room(1, 1)
    assert str(found.value) == f"{folder} can't be written: {found.value.__cause__}; there is no earlier checkpoint"
    assert found.value.__cause__.errno == errno.EEXIST


@pytest.mark.parametrize("needed", [1000, 1001])
def test_room_is_made_of_what_would_go_anyway(needed, tmp_path, free):
    """The best of each text stay, as they do once the next one is whole: step 1 of one text, steps 3 and 4 of the other."""
    store = CheckpointStore(tmp_path, ALL)
    for step, loss, digest in ((1, 1.0, "one"), (2, 5.0, "other"), (3, 2.0, "other"), (4, 6.0, "other")):
        saved_at(store, step, evaluated(step, loss, digest))
    tight = CheckpointStore(tmp_path, CheckpointConfig(keep_last=1, keep_best=1))
    free(tmp_path, lambda: 1000 + SPARE_BYTES if store.steps() == [1, 3, 4] else 0)
    assert (tight.make_room(5, needed) is None) == (needed == 1000)
    assert store.steps() == [1, 3, 4]


def test_one_that_cannot_be_removed_is_named(tmp_path, free, capsys):
    store = CheckpointStore(tmp_path, ALL)
    for step in (1, 2, 3):
        saved_at(store, step, state(step))
    (tmp_path / "step-00000001.removed" / "in the way").mkdir(parents=True)
    free(tmp_path, 0)
    assert CheckpointStore(tmp_path, CheckpointConfig(keep_last=1)).make_room(4, 1) is not None
    said = capsys.readouterr().err
    assert f"checkpoint {store.path(1)} is no longer needed but can't be removed: [Errno {errno.ENOTEMPTY}]" in said
    assert store.steps() == [1, 3], "the other one is"


# Which stay ---------------------------------------------------------------------------------------------------------


def test_the_best_of_each_text_stay(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=1, keep_best=1))
    for step, loss, digest in ((1, 1.0, "one"), (2, 5.0, "other"), (3, 2.0, "other"), (4, 6.0, "other")):
        saved_at(store, step, evaluated(step, loss, digest))
    assert store.steps() == [1, 3, 4]


def test_the_losses_of_a_checkpoint_and_their_text(tmp_path):
    store = CheckpointStore(tmp_path, ALL)
    assert losses_of(saved_at(store, 1, evaluated(1, 2.5))) == ({"new": 2.5}, {"new": "one"})
    assert losses_of(saved_at(store, 2, evaluated(2, 2.5, None))) == ({"new": 2.5}, {"new": None})
    assert losses_of(saved_at(store, 3, state(3))) == ({}, {})
    bare = state(4)
    bare["progress"]["evaluated_at"] = 4  # of a version that kept neither losses nor scores
    assert losses_of(saved_at(store, 4, bare)) == ({}, {})


def complete_but_senseless(store: CheckpointStore, step: int) -> None:
    """Every byte of it is as it was written."""

    def fill(fresh):
        (fresh / "state.json").write_text("[]")
        return [fresh / "state.json"]

    write_folder(store.path(step), fill, world=ALONE, hint=str)


def test_one_whose_state_cannot_be_read_counts_as_not_evaluated(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=1, keep_best=1))
    complete_but_senseless(store, 1)
    for step, loss in ((2, 1.0), (3, 2.0)):
        saved_at(store, step, evaluated(step, loss))
    assert store.steps() == [2, 3]


def test_what_a_kill_has_left_goes_at_the_next_save(tmp_path):
    """Of other names nothing does."""
    store = CheckpointStore(tmp_path, ALL)
    left = ["step-00000001.partial", "step-00000002.removed", "step-00000003.replaced"]
    for name in (*left, "mine.partial", "set-aside-step-00000004-5"):
        (tmp_path / name / "inner").mkdir(parents=True)
    saved_at(store, 9, state(9))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.partial", "set-aside-step-00000004-5", "step-00000009"]


def test_a_checkpoint_is_replaced_by_one_of_the_same_step(tmp_path):
    store = CheckpointStore(tmp_path)
    saved_at(store, 2, state(2))
    path = saved_at(store, 2, evaluated(2, 1.5))
    assert losses_of(path)[0] == {"new": 1.5}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


# Which are used -----------------------------------------------------------------------------------------------------


def test_the_newest_below_a_step(tmp_path):
    store = CheckpointStore(tmp_path, ALL)
    for step in (1, 3, 5):
        saved_at(store, step, state(step))
    found = {below: store.newest(below=below) for below in (None, 6, 5, 4, 3, 1, 0)}
    steps = {None: 5, 6: 5, 5: 3, 4: 3, 3: 1, 1: None, 0: None}
    assert found == {below: step and store.path(step) for below, step in steps.items()}


def test_all_bytes_are_compared_when_asked(tmp_path, monkeypatch, capsys):
    """Of a large file, here one of 60 bytes of weights, a quick look reads only some."""
    monkeypatch.setattr("pretrain.checkpoint.marker.SMALL_BYTES", 0)
    monkeypatch.setattr("pretrain.checkpoint.marker.SAMPLE_BYTES", 1)
    monkeypatch.setattr("pretrain.checkpoint.marker.SAMPLES", 2)
    quick, full = (
        CheckpointStore(tmp_path, ALL),
        CheckpointStore(tmp_path, CheckpointConfig(keep_last=None, verify="full")),
    )
    for step in (1, 2):
        saved_at(quick, step, state(step))
    flip(quick.path(2) / "model.safetensors", -3)
    assert quick.newest() == quick.path(2)
    assert capsys.readouterr().err == ""
    assert full.newest() == quick.path(1)
    assert "model.safetensors does not match its checksum" in capsys.readouterr().err


def test_one_that_cannot_be_set_aside_is_named(tmp_path):
    store = CheckpointStore(tmp_path, ALL)
    path = saved_at(store, 2, state(2))
    (tmp_path / f"set-aside-{path.name}-{path.lstat().st_mtime_ns}" / "in the way").mkdir(parents=True)
    with pytest.raises(UserError) as found:
        store.archive_after(1)
    assert str(found.value) == f"{path} belongs to another branch and can't be renamed: Directory not empty"
    assert store.newest() == path


def test_a_checkpoint_of_before_it_named_its_tensors(tmp_path):
    """Format 3 says neither how many processes have saved nor what there must be."""
    path = saved_at(CheckpointStore(tmp_path), 2, state(2))
    content = json.loads((path / "state.json").read_text())
    assert content["ranks"] == 1
    del content["ranks"], content["tensors"]
    (path / "state.json").write_text(json.dumps(content))
    write_marker(path, {p.name: entry_of(p) for p in path.iterdir() if p.name != MARKER})
    loaded = load(path)
    assert "ranks" not in loaded
    assert loaded["engine"]["tensors"] is None
    assert torch.equal(loaded["engine"]["model"].read("w"), state(2)["engine"]["model"]["w"].tensor)


# Files --------------------------------------------------------------------------------------------------------------


def test_files_of_this_moment_lie_beside_the_state_and_not_in_it(tmp_path):
    store = CheckpointStore(tmp_path, files={"config.yaml": b"a: 1"})
    heard = []
    files = {"README.md": b"card", "code/inner/model.py": b"pass", "code/inner/other.py": b""}
    size = store.save(2, state(2) | {"files": files}, world=ALONE, alive=lambda: heard.append(1))
    path = store.path(2)
    assert {name: (path / name).read_bytes() for name in files} == files
    assert (path / "config.yaml").read_bytes() == b"a: 1"
    assert json.loads((path / "state.json").read_text()).keys() == {
        *("scaler", "tensors", "identity", "loader", "progress", "rng", "ranks")
    }
    written = [p for p in path.rglob("*") if p.is_file() and p.name != MARKER]
    assert size == sum(p.stat().st_size for p in written)
    assert len(heard) == 2 * len(written), "while each is written, and while it is flushed"


@dataclass(frozen=True)
class Both:
    """Rank ``rank`` of two, both of which have tensors; the other one's files are in no marker."""

    rank: int
    size: int = 2

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, value):
        return 2 * value

    def all_gather_object(self, work):
        return [work()]

    def on_main_rank(self, work):
        return work() if self.is_main else None


@pytest.mark.parametrize(
    ("rank", "files"),
    [
        (0, {"model.rank-0.safetensors", "optimizer.rank-0.safetensors", "state.json", MARKER}),
        (1, {"model.rank-1.safetensors", "optimizer.rank-1.safetensors"}),
    ],
)
def test_each_rank_writes_its_own_pieces_and_the_first_one_the_rest(rank, files, tmp_path):
    """Another rank cleans up nothing: the first one may be at work on it."""
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=1))
    saved_at(store, 1, state(1))
    (tmp_path / "step-00000002.partial").mkdir()
    store.save(2, state(2), world=Both(rank))
    path = store.path(2) if rank == 0 else tmp_path / "step-00000002.partial"
    assert {p.name for p in path.iterdir()} == files
    assert store.path(1).exists() == (rank == 1)


def test_without_moments_there_is_no_file_of_them(tmp_path):
    saved = state(1)
    saved["engine"]["optimizer"] = {}
    saved["engine"]["tensors"]["optimizer"] = {}
    path = saved_at(CheckpointStore(tmp_path), 1, saved)
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "state.json", MARKER}
    assert list(load(path)["engine"]["optimizer"].keys()) == []
