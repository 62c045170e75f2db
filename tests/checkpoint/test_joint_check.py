"""All ranks check a checkpoint together, and each opens only the files that hold its own rows."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from pretrain.checkpoint.joint_check import UNREADABLE, joint_validation_error
from pretrain.checkpoint.marker import entry_of, write_marker
from pretrain.checkpoint.schema import validation_error
from pretrain.checkpoint.store import CheckpointStore, load
from pretrain.distributed import sharding
from pretrain.distributed.context import DistributedContext
from pretrain.distributed.sharding import TensorShard, manifest, writers
from pretrain.distributed.topology import Topology
from pretrain.runtime.errors import UserError
from tests.checkpoint.test_store import state
from tests.damage import edit_state, forge

ROWS = 8
FULL = {"w": torch.arange(24.0).reshape(ROWS, 3), "b": torch.arange(3.0), "e": torch.zeros(0, 2)}
FULL["v"] = -FULL["w"]


@dataclass
class Meeting:
    """Where the ranks of one process meet, each in a thread of its own."""

    size: int
    values: dict = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, timeout=20)


@dataclass(frozen=True)
class ThreadContext(DistributedContext):
    meeting: Meeting | None = None

    def all_gather_object(self, work):
        self.meeting.values[self.rank] = work()
        self.meeting.barrier.wait()
        found = [self.meeting.values[rank] for rank in range(self.size)]
        self.meeting.barrier.wait()
        return found

    def sum(self, value):
        return sum(self.all_gather_object(lambda: value))

    def any_rank(self, *flags):
        return [any(column) for column in zip(*self.all_gather_object(lambda: flags), strict=True)]


def by_ranks(work, size):
    """Return what ``work(world)`` returns on each of ``size`` ranks."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        worlds = [ThreadContext(rank, Topology(workers_per_node=size), meeting=meeting) for rank in range(size)]
        return list(pool.map(work, worlds))


def write(folder, ranges, *, owners=None):
    """Write a checkpoint of which file i holds the rows ``ranges[i]`` of v and w, and file 0 the other tensors."""
    folder.mkdir()
    names = []
    for i, (start, stop) in enumerate(ranges):
        shards = {name: TensorShard(FULL[name][start:stop].clone(), start, (ROWS, 3)) for name in "vw"}
        if i == 0:
            shards |= {n: TensorShard(FULL[n], 0, tuple(FULL[n].shape)) for n in ("b", "e")}
        names.append(f"model.rank-{i}.safetensors")
        sharding.write(folder / names[-1], shards)
    content = {k: v for k, v in state(3).items() if k != "engine"} | {"scaler": {}, "ranks": 1}
    content["tensors"] = {"model": manifest(FULL), "optimizer": {}}
    (folder / "state.json").write_text(json.dumps(content))
    write_marker(folder, {name: entry_of(folder / name) for name in (*names, "state.json")})
    return folder


@given(cuts=some.sets(some.integers(1, ROWS - 1)), size=some.integers(2, 5), data=some.data())
@settings(max_examples=15, deadline=None)
def test_the_ranks_find_what_one_process_finds(cuts, size, data, tmp_path_factory):
    edges = [0, *sorted(cuts), ROWS]
    ranges = list(pairwise(edges))
    path = tmp_path_factory.mktemp("made") / "step-00000003"
    assert by_ranks(lambda world: joint_validation_error(path, world=world), size) == ["no COMPLETE.json"] * size
    write(path, ranges)
    assert by_ranks(lambda world: joint_validation_error(path, world=world), size) == [None] * size

    wrong = list(ranges)
    i = data.draw(some.integers(0, len(ranges) - 1))
    start, stop = ranges[i]
    wrong[i] = data.draw(some.sampled_from([(start, stop + 1), (start, stop - 1), (start - 1, stop)]))
    if data.draw(some.booleans()):
        wrong = [*ranges, ranges[i]]  # rows that are there twice
    wrong = [(max(0, a), min(ROWS, b)) for a, b in wrong]
    if wrong == ranges:
        return
    other = write(tmp_path_factory.mktemp("wrong") / "step-00000003", wrong)
    reason = validation_error(other)
    assert reason is not None
    assert by_ranks(lambda world: joint_validation_error(other, world=world), size) == [reason] * size


def test_a_damaged_file_is_found_whoever_checks_it(tmp_path):
    path = write(tmp_path / "step-00000003", [(0, 2), (2, 4), (4, 8)])
    file = path / "model.rank-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    says = "model.rank-1.safetensors does not match its checksum"
    assert by_ranks(lambda world: joint_validation_error(path, world=world), 3) == [says] * 3


def test_the_name_of_the_folder_is_that_of_its_step(tmp_path):
    path = write(tmp_path / "step-00000004", [(0, ROWS)])
    says = "state.json belongs to step 3"
    assert validation_error(path) == says
    assert by_ranks(lambda world: joint_validation_error(path, world=world), 2) == [says] * 2


def opened(files):
    return [int(file.name.split("-")[1].split(".")[0]) for file in files.opened()]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_each_rank_opens_the_files_with_its_rows(size, tmp_path):
    ranges = list(pairwise(range(ROWS + 1)))  # 8 files of one row each
    path = write(tmp_path / "step-00000003", ranges)

    def read(world):
        files = load(path, world=world)["engine"]["model"]
        assert (files.keys(), files.shape("w"), files.dtype("w"), opened(files)) == ({*FULL}, (ROWS, 3), "float32", [])
        rows = -(-ROWS // world.size)
        start, stop = world.rank * rows, min(ROWS, (world.rank + 1) * rows)
        assert torch.equal(files.read("w", start, stop), FULL["w"][start:stop])
        assert opened(files) == list(range(start, stop))
        assert files.read("e").shape == (0, 2)
        assert torch.equal(files.read("b"), FULL["b"])
        assert opened(files) == sorted({0, *range(start, stop)})
        assert torch.equal(files.read("w"), FULL["w"])
        assert torch.equal(files.read("v"), FULL["v"]), "whatever the order in which the files were opened"
        return True

    assert by_ranks(read, size) == [True] * size


def test_rows_that_are_not_in_equal_parts(tmp_path):
    path = write(tmp_path / "step-00000003", [(0, 1), (1, 1), (1, 7), (7, 8)])

    def read(world):
        files = load(path, world=world)["engine"]["model"]
        return all(
            torch.equal(files.read("w", start, stop), FULL["w"][start:stop])
            for start in range(ROWS)
            for stop in range(start, ROWS + 1)
        )

    assert by_ranks(read, 2) == [True, True]


# Tensors that all ranks hold ------------------------------------------------------------------------------------------


def test_the_ranks_share_what_all_hold(monkeypatch):
    named = {str(size): torch.empty(size, dtype=torch.uint8) for size in (90, 70, 40, 30, 20, 10)}
    assert writers(named, 8) == {}
    monkeypatch.setattr(sharding, "SHARE_BYTES", 80)
    assert writers(named, 1) == {}
    assert writers(named, 2) == {"90": 0, "70": 1, "40": 1, "30": 0, "20": 1, "10": 0}
    assert set(writers(named, 8).values()) == {0, 1, 2}, "260 bytes are 3 shares of 80"


def test_from_pretrained_opens_what_several_ranks_have_written(exact_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    folder = exact_model("llama")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(sharding, "SHARE_BYTES", 1)
    weights = {name: p.detach() for name, p in hf.named_parameters()}
    owners, files = writers(weights, 2), {"config.json": (folder / "config.json").read_bytes()}

    def save(world):
        own = {n: TensorShard(t, 0, tuple(t.shape)) for n, t in weights.items() if owners[n] == world.rank}
        engine = {"model": own, "scaler": {}, "tensors": {"model": manifest(weights), "optimizer": {}}}
        whole = state(3) | {"rng": state(3)["rng"] * 2, "engine": engine | {"owners": {"model": owners}}}
        store = CheckpointStore(tmp_path, files=files)
        store.save(3, whole, world=world)
        found = load(store.path(3), world=world)["engine"]["model"]
        return all(torch.equal(found.read(name), t) for name, t in weights.items())

    assert by_ranks(save, 2) == [True, True]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "step-00000003")
    assert all(torch.equal(again.state_dict()[name], t) for name, t in weights.items())


def test_rank_0_chooses_what_all_have_checked(tmp_path, monkeypatch, capsys):
    """It opens no files for that itself. What another rank can't read stays the choice, and is refused when it is loaded."""
    for step, ranges in ((1, [(0, 8)]), (2, [(0, 4), (4, 8)]), (3, [(0, 4), (5, 8)])):
        folder = write(tmp_path / f"step-0000000{step}", ranges)
        edit_state(lambda s, step=step: s["progress"].update(step=step))(folder)
        forge(folder)
    store = CheckpointStore(tmp_path)
    found = by_ranks(lambda world: store.checked_by(world, resume="auto"), 3)
    assert [one.checked for one in found] == [found[0].checked] * 3
    assert list(found[0].checked) == [store.path(3), store.path(2)], "none below the first that is valid"
    monkeypatch.setattr("pretrain.checkpoint.store.validation_error", lambda *_, **__: pytest.fail("checked again"))
    assert found[0].newest() == store.path(2)
    assert "step-00000003 skipped: " in capsys.readouterr().err
    assert by_ranks(lambda world: store.checked_by(world, resume="never").checked, 2) == [{}, {}]
    named = by_ranks(lambda world: store.checked_by(world, resume=str(store.path(1))).checked, 2)
    assert named == [{store.path(3): found[0].checked[store.path(3)], store.path(2): None, store.path(1): None}] * 2


def test_what_one_rank_cannot_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "step-00000003", [(0, 4), (4, 8)])
    mine = sharding.TensorFiles.ranges
    broken = threading.local()

    def ranges(files):
        if getattr(broken, "here", False):
            raise UserError("no such file")
        return mine(files)

    monkeypatch.setattr(sharding.TensorFiles, "ranges", ranges)

    def on(world):
        broken.here = world.rank == 1
        with pytest.raises(UserError, match=f"not a complete checkpoint: {UNREADABLE}"):
            load(path, world=world)
        return CheckpointStore(tmp_path).checked_by(world, resume="auto").checked

    assert by_ranks(on, 2) == [{}, {}]
