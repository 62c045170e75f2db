"""Tensors of any shape and sharding, packed by two real ranks and restored by two or by one."""

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pretrain.distributed import sharding as tensors
from pretrain.distributed.context import DistributedContext
from pretrain.distributed.packing import AS_BEFORE, name_of, pack, restore
from pretrain.distributed.sharding import TensorFiles
from pretrain.runtime.errors import UserError
from tests.group import together

ALONE = DistributedContext()
FULL = {
    "rows": torch.arange(15.0).reshape(5, 3),
    "row norms": torch.arange(5.0).reshape(5, 1).bfloat16(),
    "columns": torch.arange(15.0, 30.0).reshape(3, 5),
    "copies": torch.arange(7, dtype=torch.uint8),
    "one row": torch.tensor([[4.0, 5.0]]),
    "number": torch.tensor(3.25, dtype=torch.float64),
    "codes": torch.arange(250, 256, dtype=torch.uint8),
}
PLACED = {"rows": Shard(0), "row norms": Shard(0), "columns": Shard(1), "copies": Replicate(), "one row": Shard(0)}
COLUMNS = {"a": torch.arange(8.0).reshape(2, 4), "b": torch.arange(8.0, 16.0).reshape(2, 4)}


def placed(world) -> dict:
    """``FULL``, its first five tensors distributed."""
    mesh = init_device_mesh("cpu", (world.size,))
    return {
        n: distribute_tensor(t.clone(), mesh, [PLACED[n]], src_data_rank=None) if n in PLACED else t.clone()
        for n, t in FULL.items()
    }


def write(named, world, folder, **more) -> dict:
    folder.mkdir(exist_ok=True)
    shards, manifest = pack(named, world=world, **more)
    tensors.write(folder / f"{world.rank}.safetensors", shards)
    world.sum(0)
    return manifest


def read(folder) -> TensorFiles:
    return TensorFiles(sorted(folder.glob("*.safetensors")))


def refusal(work) -> str:
    with pytest.raises(UserError) as refused:
        work()
    return str(refused.value)


def two_ranks(world, folder) -> dict:
    """Everything that is asked of two ranks, in one group."""
    found = {}
    manifest = write(placed(world), world, folder / "shared")
    found["manifest"] = manifest
    like = {n: torch.zeros_like(t) for n, t in placed(world).items()}
    restore(read(folder / "shared"), like=like, world=world)
    found["shared"] = all(torch.equal(tensors.local(like[n]), tensors.local(t)) for n, t in placed(world).items())

    own = {"same": torch.ones(3), "own": torch.tensor([0.0, 0.0])}
    own["own"][world.rank] = 1  # the sum of the bits is the same on both ranks
    if world.rank:
        own["of rank 1"] = torch.arange(world.rank + 4)
    known: set[str] = set()
    found["own manifest"] = write(own, world, folder / "own", rank_local=known)
    found["known"] = known
    back = {n: torch.zeros_like(t) for n, t in own.items()}
    restore(read(folder / "own"), like=back, world=world)
    found["own"] = all(torch.equal(back[n], t) for n, t in own.items())
    own["own"].fill_(2)
    found["once local, always local"] = set(write(own, world, folder / "again", rank_local=known))
    found["replicas are not compared"] = pack({"a": torch.tensor(world.rank)}, world=world, replicas={"a"})[1]
    found["another strategy"] = refusal(
        lambda: restore(read(folder / "own"), like=back | {"own": torch.zeros(4)}, world=world)
    )
    columns = {n: distribute_tensor(t, init_device_mesh("cpu", (world.size,)), [Shard(1)]) for n, t in COLUMNS.items()}
    write(columns if world.is_main else dict(reversed(columns.items())), world, folder / "columns")
    found["on one rank"] = refusal(
        lambda: pack({"z": placed(world)["rows"] if world.rank else torch.zeros(2)}, world=world)
    )
    found["sparse"] = refusal(
        lambda: pack({"s": torch.eye(2).to_sparse() if world.rank else torch.eye(2)}, world=world)
    )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packing")


@pytest.fixture(scope="module")
def found(folder):
    return together(two_ranks, folder, folder=folder)


def test_each_by_its_own_shape_and_sharding(found, folder):
    for of_rank in found:
        assert of_rank["manifest"] == tensors.manifest(FULL)
        assert of_rank["shared"]
    files = read(folder / "shared")
    assert files.keys() == FULL.keys()
    for name, tensor in FULL.items():
        assert files.read(name).dtype == tensor.dtype, name
        assert torch.equal(files.read(name), tensor), name


def test_the_order_of_the_names_of_a_rank_does_not_matter(found, folder):
    files = read(folder / "columns")
    assert {name: files.read(name).tolist() for name in COLUMNS} == {n: t.tolist() for n, t in COLUMNS.items()}


def test_one_process_restores_what_two_have_sharded(found, folder):
    like = {name: torch.zeros_like(tensor) for name, tensor in FULL.items()}
    memory = {name: tensor.data_ptr() for name, tensor in like.items()}
    restore(read(folder / "shared"), like=like, world=ALONE)
    assert all(torch.equal(like[name], tensor) for name, tensor in FULL.items())
    assert {name: tensor.data_ptr() for name, tensor in like.items()} == memory, "in place"


def test_what_belongs_to_a_rank_is_saved_by_each(found, folder):
    names = {"same", "rank-0-of-2/own", "rank-1-of-2/own", "rank-1-of-2/of rank 1"}
    for of_rank in found:
        assert of_rank["own manifest"].keys() == names
        assert of_rank["own"]
        assert of_rank["known"] == {"own", "of rank 1"}
        assert of_rank["once local, always local"] == names
        assert of_rank["replicas are not compared"] == {"a": ("int64", [])}
    assert torch.equal(read(folder / "own").read("rank-1-of-2/own"), torch.tensor([0.0, 1.0]))
    assert found[0]["own manifest"]["rank-1-of-2/of rank 1"] == ("int64", [5])


def test_another_number_of_processes_or_strategy_is_refused(found, folder):
    like = {"same": torch.zeros(3), "own": torch.zeros(2), "of rank 1": torch.zeros(5)}
    assert refusal(lambda: restore(read(folder / "own"), like=like, world=ALONE)) == (
        f"own was saved by each of 2 processes for itself and can't be resharded (this run has 1); {AS_BEFORE}"
    )
    assert not any(t.any() for t in like.values()), "nothing is changed"
    for of_rank in found:
        assert of_rank["another strategy"] == f"own has shape (2,) in the checkpoint and (4,) here; {AS_BEFORE}"


def test_what_cannot_be_saved_is_refused_on_every_rank(found):
    for of_rank in found:
        assert (
            of_rank["on one rank"] == "z can't be saved in a checkpoint: it is sharded, but not the same on all ranks"
        )
        assert of_rank["sparse"].startswith("s can't be saved in a checkpoint: it is torch.sparse_coo, torch.float32")


class Quantized(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2).as_subclass(Quantized), "its class Quantized has a layout of its own"),
        (torch.zeros(2, dtype=torch.complex64), "it is torch.strided, torch.complex64, on cpu"),
        (torch.zeros(2, device="meta"), "it is torch.strided, torch.float32, on meta"),
    ],
    ids=["class", "complex", "meta"],
)
def test_what_no_file_can_hold(tensor, reason):
    assert refusal(lambda: pack({"a": tensor}, world=ALONE)) == f"a can't be saved in a checkpoint: {reason}"


def test_one_process_packs_without_copies():
    shards, manifest = pack(FULL, world=ALONE)
    assert manifest == tensors.manifest(FULL)
    assert [shards[n].tensor.data_ptr() for n in FULL] == [t.data_ptr() for t in FULL.values()]


def test_other_names_and_shapes_are_refused(tmp_path):
    write({"a": torch.ones(2), "b": torch.ones(3)}, ALONE, tmp_path)
    a, b = torch.zeros(2), torch.zeros(3)
    for like, says in (
        ({"a": a}, "saved tensors that do not fit: b in the checkpoint only"),
        ({"a": a, "b": b, "c": b}, "saved tensors that do not fit: c in this run only"),
        ({"a": a, "b": torch.zeros(4)}, f"b has shape (3,) in the checkpoint and (4,) here; {AS_BEFORE}"),
    ):
        assert refusal(lambda like=like: restore(read(tmp_path), like=like, world=ALONE)) == says
    assert not a.any()


def test_tensors_that_are_the_same_memory_are_written(tmp_path):
    step = torch.tensor(4.0)
    write({"a/step": step, "b/step": step}, ALONE, tmp_path)
    assert float(read(tmp_path).read("b/step")) == 4.0


def test_names_without_their_rank():
    assert [name_of(n) for n in ("rank-3-of-16/a/b", "rank-3/a", "a/rank-3-of-16/b")] == [
        "a/b",
        "rank-3/a",
        "a/rank-3-of-16/b",
    ]


CRAFTED = [
    f"rank-0-of-{'9' * 5000}/w/x",
    f"rank-{'0' * 5000}-of-1/w/x",
    "rank-\u0660-of-\u0661/w/x",
    "rank--1-of-1/w/x",
]


@pytest.mark.parametrize("name", CRAFTED, ids=range(len(CRAFTED)))
def test_a_name_that_no_rank_has_given_is_an_ordinary_one(name, tmp_path):
    save_file({name: torch.ones(2)}, tmp_path / "0.safetensors")
    assert name_of(name) == name
    said = refusal(lambda: restore(read(tmp_path), like={"w/x": torch.zeros(2)}, world=ALONE))
    assert said.startswith("saved tensors that do not fit: rank-")


def test_two_tensors_of_one_rank_and_name_are_refused(tmp_path):
    save_file({"w": torch.ones(2), "rank-0-of-1/w": torch.zeros(2)}, tmp_path / "0.safetensors")
    assert refusal(lambda: restore(read(tmp_path), like={"w": torch.zeros(2)}, world=ALONE)) == (
        "w is in the checkpoint more than once"
    )
