"""Which rows of a tensor are whose, and what is read of files that hold pieces; real ranks: strategy/test_round_trip.py."""

import gc
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.distributed import sharding as tensors
from pretrain.distributed.sharding import TensorFiles, TensorShard, fill, local_shard, write
from pretrain.runtime.errors import UserError
from pretrain.runtime.memory import read_kib

ROWS = torch.arange(15, dtype=torch.float32).reshape(5, 3)


@pytest.fixture
def rank_of():
    """``rank_of(rank, shape)``: this process as one rank of a mesh of that shape; nothing is communicated."""

    def become(rank: int, *shape: int):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=torch.Size(shape).numel())
        return init_device_mesh("cpu", shape)

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def part_of(mesh, tensor, placements):
    """The DTensor of ``tensor`` of which this rank holds its rows, as torch deals them out."""
    for dim, placement in enumerate(placements):
        if placement == Shard(0):
            sizes = tensor.chunk(mesh.size(dim))
            mine = mesh.get_local_rank(dim)
            part = sizes[mine] if mine < len(sizes) else tensor[:0]
            break
    else:
        part = tensor
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@pytest.mark.parametrize(("rank", "start", "rows"), [(0, 0, 2), (1, 2, 2), (2, 4, 1), (3, 5, 0)])
def test_the_rows_of_a_rank(rank, start, rows, rank_of):
    tensor = part_of(rank_of(rank, 4), ROWS.clone().requires_grad_(), [Shard(0)])
    assert tensors.start_of(tensor) == start
    assert torch.equal(tensors.local(tensor), ROWS[start : start + rows])
    assert not tensors.is_replicated(tensor)
    piece = local_shard(tensor, is_main=rank == 0)
    if not rows:
        assert piece is None, "an empty piece, unless of rank 0, which writes those that have no rows at all"
        piece = local_shard(tensor, is_main=True)
    assert (piece.start, piece.shape) == (start, (5, 3))
    assert torch.equal(piece.tensor, ROWS[start : start + rows])
    assert not piece.tensor.requires_grad


@pytest.mark.parametrize("rank", range(6))
@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(0), Shard(0)),
        (Replicate(), Shard(1)),
        (Shard(0), Replicate()),
    ],
    ids=str,
)
def test_where_a_shard_starts_in_several_dimensions(placements, rank, rank_of):
    """It starts where torch itself cuts."""
    full = torch.arange(35).reshape(5, 7)
    tensor = distribute_tensor(full, rank_of(rank, 3, 2), placements, src_data_rank=None)
    rows, columns = tensors.start_in(tensor)
    mine = tensor.to_local()
    assert torch.equal(full[rows : rows + mine.shape[0], columns : columns + mine.shape[1]], mine)
    assert rows == tensors.start_of(tensor)


@pytest.mark.parametrize(("rank", "writes", "start"), [(0, True, 0), (1, True, 3), (2, False, 0), (3, False, 3)])
def test_of_equal_copies_the_first_ranks_count(rank, writes, start, rank_of):
    """Two copies, each of them on two ranks."""
    tensor = part_of(rank_of(rank, 2, 2), ROWS, [Replicate(), Shard(0)])
    assert tensors.is_replicated(tensor)
    piece = local_shard(tensor, is_main=rank == 0)
    assert (piece is not None) is writes
    if writes:
        assert (piece.start, piece.shape, len(piece.tensor)) == (start, (5, 3), 3 - start // 3)


def test_copies_on_one_rank_are_no_copies(rank_of):
    assert not tensors.is_replicated(part_of(rank_of(1, 1, 2), ROWS, [Replicate(), Shard(0)]))


def test_a_number_lies_on_every_rank(rank_of):
    number = part_of(rank_of(1, 2), torch.tensor(3.0), [Replicate()])
    assert tensors.start_of(number) == 0
    assert local_shard(number, is_main=False) is None


def test_rows_that_are_no_first_dimension_are_refused(rank_of):
    tensor = DTensor.from_local(ROWS[:, :2], rank_of(0, 2), [Shard(1)], run_check=False)
    with pytest.raises(AssertionError):
        local_shard(tensor, is_main=True)


def test_a_plain_tensor_is_rank_zeros():
    tensor = ROWS.clone().requires_grad_()
    assert tensors.local(tensor) is tensors.full_tensor(tensor) is tensor
    assert tensors.start_of(tensor) == 0
    assert tensors.is_replicated(tensor)
    assert local_shard(tensor, is_main=False) is None
    piece = local_shard(tensor, is_main=True)
    assert (piece.start, piece.shape, piece.tensor.requires_grad) == (0, (5, 3), False)
    assert piece.tensor.data_ptr() == tensor.data_ptr(), "no copy"


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([1, 2, 300], dtype=torch.int16), 303),
        (torch.tensor([-1, -1], dtype=torch.int32), -2),
        (torch.tensor([[2**40, 1], [1, 1]]), 2**40 + 3),
        (torch.tensor([200, 100], dtype=torch.uint8), 300),
        (torch.tensor([1.0, -2.0]), 0x3F800000 - 0x40000000),
        (torch.tensor([1.0], dtype=torch.bfloat16), 0x3F80),
        (torch.tensor(1.0, dtype=torch.float64), 0x3FF0000000000000),
        (torch.zeros(0), 0),
    ],
    ids=lambda given: str(getattr(given, "dtype", "")),
)
def test_checksums_are_sums_of_bits(tensor, expected, monkeypatch):
    found = tensors.checksum(tensor)
    assert (found.dtype, found.ndim, int(found)) == (torch.int64, 0, expected)
    monkeypatch.setattr(tensors, "CHECKSUM_NUMBERS", 2)
    assert int(tensors.checksum(tensor)) == expected


def test_a_checksum_needs_no_gradient():
    assert not tensors.checksum(ROWS.clone().requires_grad_().t().contiguous()).requires_grad


# Files --------------------------------------------------------------------------------------------------------------


def pieces_file(path, pieces, **tensor):
    save_file(
        tensor, path, metadata={"format": "pt", "pieces": pieces if isinstance(pieces, str) else json.dumps(pieces)}
    )
    return path


def test_nothing_to_write(tmp_path):
    assert write(tmp_path / "a.safetensors", {}) is False
    assert list(tmp_path.iterdir()) == []


def test_what_is_written(tmp_path):
    """A whole tensor needs no word on where it lies."""
    path = tmp_path / "a.safetensors"
    assert write(path, {"a": TensorShard(ROWS[2:4], 2, (5, 3)), "b": TensorShard(ROWS.t(), 0, (3, 5))}) is True
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "pieces": json.dumps({"a": [2, [5, 3]]})}
        assert torch.equal(file.get_tensor("a"), ROWS[2:4])
        assert torch.equal(file.get_tensor("b"), ROWS.t())
    assert write(path, {"b": TensorShard(ROWS, 0, (5, 3))})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.fixture
def files(tmp_path):
    """``a``: rows 0–1, none, 2–3 and 4 in four files out of order; ``n``: a number; ``e``: no rows at all."""
    parts = [(4, 5), (2, 2), (2, 4), (0, 2)]
    for number, (start, stop) in enumerate(parts):
        named = {"a": TensorShard(ROWS[start:stop], start, (5, 3))}
        if number == 2:
            named |= {
                "n": TensorShard(torch.tensor(7.0), 0, ()),
                "e": TensorShard(torch.zeros(0, 2, dtype=torch.bfloat16), 0, (0, 2)),
            }
        write(tmp_path / f"{number}.safetensors", named)
    return TensorFiles(sorted(tmp_path.iterdir()))


def test_rows_of_several_files(files):
    assert files.keys() == {"a", "n", "e"}
    assert (files.shape("a"), files.shape("n"), files.shape("e")) == ((5, 3), (), (0, 2))
    assert (files.dtype("a"), files.dtype("e")) == ("float32", "bfloat16")
    assert torch.equal(files.read("a"), ROWS)
    for start in range(6):
        for stop in range(start, 6):
            assert torch.equal(files.read("a", start, stop), ROWS[start:stop]), (start, stop)
    assert torch.equal(files.read("a", 3), ROWS[3:])
    assert files.read("n").item() == 7.0
    assert files.read("e").shape == (0, 2)


def test_rows_that_no_file_has(files):
    with pytest.raises(AssertionError, match=r"^a: rows 3 to 7 are not all in the files$"):
        files.read("a", 3, 7)


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([(0, 2, (5, 3)), (3, 5, (5, 3))], "a: rows 2 to 3 are missing"),
        ([(1, 5, (5, 3))], "a: rows 0 to 1 are missing"),
        ([(0, 3, (5, 3)), (2, 5, (5, 3))], "a: rows 2 to 3 are there twice"),
        ([(0, 4, (5, 3))], "a: 4 rows of 5"),
        ([(0, 5, (4, 3))], "a: 5 rows of 4"),
        ([(0, 5, (5, 2))], "a: a shard of shape [5, 3] in a tensor of shape [5, 2]"),
        ([(0, 5, (5,))], "a: a shard of shape [5, 3] in a tensor of shape [5]"),
        ([(0, 5, (5, 3, 1))], "a: a shard of shape [5, 3] in a tensor of shape [5, 3, 1]"),
        ([(0, 5, ())], "a: more than one number"),
    ],
)
def test_pieces_that_do_not_make_a_whole(pieces, says, tmp_path):
    for number, (start, stop, shape) in enumerate(pieces):
        pieces_file(tmp_path / f"{number}", {"a": [start, list(shape)]}, a=ROWS[start:stop])
    with pytest.raises(UserError) as refused:
        TensorFiles(sorted(tmp_path.iterdir()))
    assert str(refused.value) == f"{tmp_path / str(len(pieces) - 1)}: {says}"


def test_a_number_that_is_there_twice(tmp_path):
    for name in ("0", "1"):
        save_file({"n": torch.tensor(1.0)}, tmp_path / name)
    with pytest.raises(UserError, match=r"/1: n: more than one number$"):
        TensorFiles(sorted(tmp_path.iterdir()))


@pytest.mark.parametrize(
    "other", [TensorShard(ROWS[2:].double(), 2, (5, 3)), TensorShard(ROWS[2:], 2, (6, 3))], ids=["type", "shape"]
)
def test_the_files_must_mean_the_same_tensor(other, tmp_path):
    write(tmp_path / "0", {"a": TensorShard(ROWS[:2], 0, (5, 3))})
    write(tmp_path / "1", {"a": other})
    with pytest.raises(UserError) as refused:
        TensorFiles(sorted(tmp_path.iterdir()))
    assert str(refused.value) == f"{tmp_path / '1'} can't be read: a has another dtype or shape than in the other files"


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ({"b": [0, [5, 3]], "c": [0, [1]]}, "b is not in it"),
        ({"a": [0, [5, 3]], "z": [0, [1]]}, "z is not in it"),
        ([], "its pieces are not first rows and shapes"),
        *(
            ({"a": wrong}, "its pieces are not first rows and shapes")
            for wrong in (
                *(5, [0], [0, [5, 3], 1], [0, 5], [0, {"a": 1}], [-1, [5, 3]], [0, [5, -1]], [True, [5, 3]]),
                *([0, [5, True]], [0.0, [5, 3]], [0, ["5", 3]], [None, [5, 3]], {"0": 1, "1": []}),
            )
        ),
    ],
)
def test_a_file_that_says_nonsense_of_its_pieces(pieces, says, tmp_path):
    path = pieces_file(tmp_path / "0", pieces, a=ROWS)
    with pytest.raises(UserError) as refused:
        TensorFiles([path])
    assert str(refused.value) == f"{path} can't be read: {says}"


def test_a_start_of_zero_is_a_start(tmp_path):
    path = pieces_file(tmp_path / "0", {"a": [0, [5, 3]], "e": [0, [0, 2]]}, a=ROWS, e=torch.zeros(0, 2))
    assert torch.equal(TensorFiles([path]).read("a"), ROWS)


def test_what_is_no_file_of_tensors(tmp_path):
    (tmp_path / "0").write_bytes(b"no")
    for path in (tmp_path / "0", tmp_path / "missing"):
        with pytest.raises(UserError) as refused:
            TensorFiles([path])
        assert str(refused.value).startswith(f"{path} can't be read: ")


@pytest.fixture
def two_files(tmp_path):
    for name, start in (("a", 0), ("b", 2)):
        write(tmp_path / name, {"a": TensorShard(ROWS[start : start + 2], start, (4, 3))})
    return [tmp_path / "a", tmp_path / "b"]


def test_what_takes_the_name_of_a_file_is_not_read(two_files):
    files = TensorFiles(two_files)
    write(two_files[0].with_name("new"), {"a": TensorShard(-ROWS[:2], 0, (4, 3))})
    two_files[0].with_name("new").rename(two_files[0])
    two_files[1].unlink()
    assert torch.equal(files.read("a"), ROWS[:4])
    descriptors = len(os.listdir("/proc/self/fd"))
    del files
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors - 2, "closed"


def test_a_file_that_is_opened_again_is_the_same(two_files, monkeypatch):
    monkeypatch.setattr(tensors, "OpenFiles", partial(tensors.OpenFiles, limit=1))
    files = TensorFiles(two_files)
    assert torch.equal(files.read("a"), ROWS[:4])
    assert torch.equal(files.read("a", 0, 2), ROWS[:2]), "b is closed"
    write(two_files[1].with_name("new"), {"a": TensorShard(-ROWS[2:4], 2, (4, 3))})
    two_files[1].with_name("new").rename(two_files[1])
    with pytest.raises(UserError, match=r"/b: another file has taken its place while it was in use$"):
        files.read("a", 2, 4)
    two_files[1].unlink()
    with pytest.raises(UserError, match=r"/b: can't be opened again: No such file or directory$"):
        files.read("a", 2, 4)


def test_a_file_that_is_written_over(two_files):
    files = TensorFiles(two_files)
    content = two_files[0].read_bytes()
    two_files[0].write_bytes(content[:-12] + bytes(12))
    os.utime(two_files[0], ns=(1, 1))
    with pytest.raises(UserError, match=r"/a: the file was written to while it was in use$"):
        files.read("a")
    two_files[0].write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"/a: the file has become shorter since it was opened$"):
        files.read("a")


def test_one_without_metadata_is_whole(tmp_path):
    save_file({"a": ROWS}, tmp_path / "0")
    assert torch.equal(TensorFiles([tmp_path / "0"]).read("a", 1, 3), ROWS[1:3])


# Into a model -------------------------------------------------------------------------------------------------------


def test_type_and_shape():
    assert tensors.described(ROWS.bfloat16()) == ("bfloat16", [5, 3])
    assert tensors.manifest({"a": ROWS, "n": torch.tensor(1)}) == {"a": ("float32", [5, 3]), "n": ("int64", [])}


def test_fill_takes_what_is_ours(files, rank_of):
    plain = torch.zeros(5, 3, requires_grad=True)
    tensors.fill(plain, files, "a")
    assert torch.equal(plain, ROWS)
    number = torch.zeros(())
    tensors.fill(number, files, "n")
    assert number.item() == 7.0
    for rank, rows in ((0, ROWS[:3]), (1, ROWS[3:])):
        sharded = part_of(rank_of(rank, 2), torch.zeros(5, 3), [Shard(0)])
        tensors.fill(sharded, files, "a")
        assert torch.equal(sharded.to_local(), rows)


def test_another_shape_is_refused(files):
    with pytest.raises(UserError) as refused:
        tensors.fill(torch.zeros(3, 5), files, "a")
    assert str(refused.value) == "weights that do not fit the model: a is (5, 3), the model's (3, 5)"


def test_other_names_are_refused(files):
    tensors.check_names(["a", "n", "e"], files)
    with pytest.raises(UserError) as refused:
        tensors.check_names(["a", "e", "y", "x"], files)
    assert str(refused.value) == "weights that do not fit the model: n, x, y on one side only"
    with pytest.raises(UserError, match=r": a, e, n, p, q on one side only$"):
        tensors.check_names(["r", "q", "p"], files)


def test_what_is_read_does_not_stay_in_memory(tmp_path):
    """A resumed run copies its state into tensors that exist: the pages of the files must not count beside them."""
    size = 36 * 2**20  # bytes of each tensor; the allocator gives so large ones back at once
    save_file({f"t{i}": torch.full((4, size // 16), float(i)) for i in range(4)}, tmp_path / "a.safetensors")
    files, into = TensorFiles([tmp_path / "a.safetensors"]), torch.zeros(4, size // 16)
    status = Path("/proc/self/status")
    before = read_kib(status, "RssFile"), read_kib(status, "RssAnon")
    for i in range(4):
        fill(into, files, f"t{i}")
        assert float(into.sum()) == i * into.numel()
    after = read_kib(status, "RssFile"), read_kib(status, "RssAnon")
    assert all(b - a < 2 * into.nbytes for a, b in zip(before, after, strict=True)), (before, after)
