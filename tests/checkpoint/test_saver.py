"""Saving in the background saves the moment it was asked for, one checkpoint at a time, and never fails silently."""

import shutil
import threading
from dataclasses import dataclass, field

import pytest
import torch

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.store import CheckpointStore, load
from pretrain.checkpoint.writer import AsyncCheckpointWriter
from pretrain.runtime.errors import UserError
from tests.checkpoint.test_store import ALONE, state
from tests.runs import injected

ALL = CheckpointConfig(keep_last=None)


@dataclass(frozen=True)
class SlowStore(CheckpointStore):
    """A disk that writes when it is allowed to."""

    may_write: threading.Event = field(default_factory=threading.Event)

    def save(self, *args, **options):
        self.may_write.wait()
        return super().save(*args, **options)


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    saver = AsyncCheckpointWriter(SlowStore(tmp_path, ALL), world=ALONE, background=True)
    changing, expected = state(1), state(1)
    saver.save(1, changing, at_once=False)
    for kind in ("model", "optimizer"):
        for piece in changing["engine"][kind].values():
            piece.tensor.zero_()
    assert saver.collect() is None, "not whole yet"
    assert not (tmp_path / "step-00000001").exists()
    saver.store.may_write.set()
    saver.wait()
    saved = saver.collect()
    assert (saved.step, saved.path) == (1, tmp_path / "step-00000001")
    assert saved.blocked_seconds < saved.seconds
    files = load(saved.path)["engine"]
    for kind in ("model", "optimizer"):
        for name, piece in expected["engine"][kind].items():
            assert torch.equal(files[kind].read(name), piece.tensor), name
    assert saved.bytes == sum(f.stat().st_size for f in saved.path.iterdir() if f.name != "COMPLETE.json")


def test_one_at_a_time(tmp_path):
    saver = AsyncCheckpointWriter(SlowStore(tmp_path, ALL), world=ALONE, background=True)
    saver.save(1, state(1), at_once=False)
    second = threading.Thread(target=saver.save, args=(2, state(2)), kwargs={"at_once": False})
    second.start()
    second.join(0.2)
    assert second.is_alive(), "it waits for the first"
    saver.store.may_write.set()
    second.join()
    saver.wait()
    assert [saver.collect().step, saver.collect().step, saver.collect()] == [1, 2, None]
    for step in (1, 2):
        name = next(iter(state(step)["engine"]["model"]))
        expected = state(step)["engine"]["model"][name].tensor
        assert torch.equal(load(saver.store.path(step))["engine"]["model"].read(name), expected), "no mixture of both"


@pytest.mark.parametrize("background", [True, False])
def test_what_goes_wrong_is_raised(background, tmp_path):
    saver = AsyncCheckpointWriter(CheckpointStore(tmp_path, ALL), world=ALONE, background=background)
    saver.save(1, state(1), at_once=False)
    saver.wait()
    (tmp_path / "step-00000002.partial").write_text("a file where the folder has to be")
    with pytest.raises(
        UserError, match=f"step-00000002 could not be written.*the last valid checkpoint is {saver.store.path(1)}"
    ):
        saver.save(2, state(2), at_once=False)
        while not saver.failed:
            pass
        saver.collect()
    assert saver.collect().step == 1
    assert saver.store.newest() == saver.store.path(1)
    saver.save(3, state(3), at_once=True)
    assert saver.collect().step == 3, "said once; the next one is a new one"


@pytest.fixture
def free(monkeypatch):
    """Set how many bytes the disk says are free."""

    def set_free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, count()))

    return set_free


def test_without_room_the_run_goes_on_until_its_last_checkpoint(tmp_path, free, capsys):
    saver = AsyncCheckpointWriter(
        CheckpointStore(tmp_path, CheckpointConfig(keep_last=1)), world=ALONE, background=True
    )
    saver.save(1, state(1), at_once=False)
    saver.wait()
    free(lambda: 1000)
    saver.save(2, state(2), at_once=False)
    saver.wait()
    said = capsys.readouterr().err
    assert f"{saver.store.path(2)} could not be written: it needs" in said
    assert f"the last valid checkpoint is {saver.store.path(1)}; the run continues" in said
    assert saver.store.steps() == [1]
    with pytest.raises(UserError, match="GiB free"):
        saver.save(3, state(3), at_once=True)
    assert saver.store.newest() == saver.store.path(1)


def test_room_is_made_of_what_would_go_anyway(tmp_path, free):
    """With keep_last=2, once the fourth is whole the second goes: it goes first where the disk is full. The third stays."""
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=2))
    for step in (1, 2, 3):
        store.save(step, state(step), world=ALONE)
    assert store.steps() == [2, 3]
    free(lambda: 1 << 40 if store.steps() == [3] else 1)
    assert store.make_room(4, 1000) is None
    assert store.steps() == [3]
    one = CheckpointStore(tmp_path, CheckpointConfig(keep_last=1))
    free(lambda: 1)  # some file systems say 0 when they mean that they do not know
    assert "0.00 GiB free" in one.make_room(4, 1000)
    assert store.steps() == [3], "the last whole one is never removed before the next is whole"


NO_GATHERING = """
from torch.distributed.tensor import DTensor
real = DTensor.full_tensor
def full_tensor(self, *given, **more):
    assert not self.ndim, "a rank gathers the whole"
    return real(self, *given, **more)
DTensor.full_tensor = full_tensor
"""


@pytest.mark.slow
def test_no_rank_gathers_the_whole_state(base_arguments, spawn, tmp_path):
    """Of two processes that shard, each writes and reads its own rows. Only an exported model is one."""
    pair = [*base_arguments, "strategy=fsdp", "devices=2", "batch_size=1", f"output_dir={tmp_path / 'run'}"]
    environment = injected(tmp_path, NO_GATHERING)
    for begun, steps, export, code in ((0, 10, "never", 0), (10, 20, "never", 0), (20, 25, "end", 1)):
        process = spawn([*pair, f"max_steps={steps}", f"checkpoint.export={export}"], env=environment)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == code, out
        assert CheckpointStore(tmp_path / "run/checkpoints").newest() == tmp_path / f"run/checkpoints/step-{steps:08d}"
        assert ("a rank gathers the whole" in out) == bool(code)
        assert f"continues at step {begun} of" in out or not begun
