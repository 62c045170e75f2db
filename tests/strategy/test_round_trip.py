"""A checkpoint loaded and saved again is the same to the last bit, on any number of ranks and however they share it."""

import multiprocessing

import pytest
import torch

from pretrain.checkpoint.store import bytes_of
from pretrain.distributed import sharding as tensors
from pretrain.distributed.context import DistributedContext
from pretrain.distributed.sharding import TensorFiles
from pretrain.launch.agent import warm_up
from pretrain.strategy.ddp import Ddp
from pretrain.strategy.fsdp import Fsdp
from pretrain.strategy.single import Single
from tests.strategy.ranks import as_rank, set_up

KINDS = ("model", "optimizer")


def read(folder):
    return {kind: TensorFiles(sorted(folder.glob(f"{kind}*"))) for kind in KINDS}


def write(engine, folder):
    state = engine.state_dict()
    for kind in KINDS:
        tensors.write(folder / f"{kind}.rank-{engine.world.rank}.safetensors", state[kind])


def save_again(strategy, factory, rank, size, saved, again):
    with as_rank(rank, size) as world:
        engine = set_up(strategy, factory, world)
        engine.load_state_dict({**read(saved), "scaler": {}})
        write(engine, again)


@pytest.mark.parametrize(
    ("strategy", "size"),
    [
        (Ddp(), 2),
        (Fsdp(), 3),
        *(
            pytest.param(*given, marks=pytest.mark.slow)
            for given in (
                (Fsdp(), 1),
                (Fsdp(), 7),  # divides no dimension
                (Fsdp(sharding_strategy="SHARD_GRAD_OP", cpu_offload=True), 2),
                (Fsdp(sharding_strategy="HYBRID_SHARD"), 4),
                (Fsdp(sharding_strategy="NO_SHARD"), 2),
            )
        ),
    ],
    ids=str,
)
def test_a_checkpoint_comes_back(strategy, size, factory, batch, tmp_path):
    saved, again = tmp_path / "saved", tmp_path / "again"
    saved.mkdir()
    again.mkdir()
    origin = set_up(Single(), factory("llama-tied"), DistributedContext())
    for _ in range(2):
        origin.backward(batch, tokens=32, last=True)
        origin.step(None)
    write(origin, saved)
    warm_up()
    ranks = multiprocessing.get_context("forkserver")
    given = (strategy, factory("llama-tied"))
    children = [ranks.Process(target=save_again, args=(*given, rank, size, saved, again)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    for kind, files in read(saved).items():
        found = read(again)[kind]
        assert found.keys() == files.keys()
        for name in sorted(files.keys()):
            ours, theirs = found.read(name), files.read(name)
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name


def test_the_ranks_of_ddp_share_the_writing(factory, batch, tmp_path, monkeypatch):
    """Each writes full tensors of about the same size, and says in state.json who has which."""
    monkeypatch.setattr(tensors, "SHARE_BYTES", 1)
    origin = set_up(Single(), factory("llama-tied"), DistributedContext())
    origin.backward(batch, tokens=32, last=True)
    origin.step(None)
    (tmp_path / "saved").mkdir()
    write(origin, tmp_path / "saved")
    sizes, described = [], origin.state_dict()["tensors"]
    for rank in range(3):
        with as_rank(rank, 3) as world:
            engine = set_up(Ddp(), factory("llama-tied"), world)
            engine.load_state_dict({**read(tmp_path / "saved"), "scaler": {}})
            state = engine.state_dict()
            assert {kind: set(state[kind]) for kind in KINDS} == {
                kind: {name for name, owner in state["owners"][kind].items() if owner == rank} for kind in KINDS
            }
            write(engine, tmp_path)
            sizes.append(bytes_of({"engine": state}))
    assert max(sizes) - min(sizes) < max(p.nbytes for p in origin.model.parameters())
    for kind, files in read(tmp_path / "saved").items():
        paths = sorted(tmp_path.glob(f"{kind}*"))
        lazy = TensorFiles(paths, described[kind], state["owners"][kind])
        for name in sorted(files.keys()):
            assert torch.equal(lazy.read(name), files.read(name)), name
        one = next(iter(state[kind]))
        lazy = TensorFiles(paths, described[kind], state["owners"][kind])
        lazy.read(one)
        assert lazy.opened() == [paths[2]], "that of the last rank alone"
