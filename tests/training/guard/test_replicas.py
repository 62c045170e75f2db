"""Ranks that hold the same weights: one whose gradient or weights are changed behind its back, by real faults in a real run."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.marker import incomplete_reason
from pretrain.distributed.sharding import checksum
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.preloaded import run_preloaded
from tests.runs import injected
from tests.training.guard.test_guarded_runs import equal, weights

SLOW = pytest.mark.slow

# On rank 1, after the ranks have reduced their gradients: a NaN in them at step 3, a flipped bit in the weights at step 7.
FAULTS = """
import itertools
import os

import torch

from pretrain.strategy.engine import Engine

real, calls = Engine.clip, itertools.count(1)


def first(engine):
    found = next(p for p in engine.model.parameters() if p.grad is not None)
    return [t.to_local() if hasattr(t, "to_local") else t for t in (found.data, found.grad)]


def clip(self, max_norm):
    step, (weight, gradient) = next(calls), first(self)
    if os.environ.get("RANK") == "1" and step == 3:
        gradient.view(-1)[0] = float("nan")
    if os.environ.get("RANK") == "1" and step == FLIP_AT:
        weight.view(torch.int32).view(-1)[5] ^= 1
    return real(self, max_norm)


Engine.clip = clip
"""


@pytest.fixture
def run_with_faults(base_arguments, exact_model, tmp_path):
    def start(*more, flip_at=7):
        given = [*base_arguments, f"model_name={exact_model('llama')}", "devices=2", "batch_size=1", "sink=jsonl"]
        given += ["evaluate_every=null", "checkpoint.keep_last=null", f"output_dir={tmp_path / 'run'}", *more]
        environment = injected(tmp_path, FAULTS.replace("FLIP_AT", str(flip_at)))
        done = run_preloaded(["-m", "pretrain", *given], timeout=180, env=environment)
        return done, tmp_path / "run"

    return start


def skipped(run):
    return {r["step"]: r["skipped_steps"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"}


@pytest.mark.parametrize(
    "more",
    [
        ["strategy=ddp"],
        pytest.param(["strategy=fsdp", "strategy.sharding_strategy=NO_SHARD"], marks=SLOW, id="NO_SHARD"),
        pytest.param(["strategy=deepspeed", "strategy.zero_stage=0"], marks=SLOW, id="zero 0"),
    ],
)
def test_all_ranks_leave_a_step_out_together_and_a_replica_that_differs_ends_the_run(more, run_with_faults):
    done, run = run_with_faults(*more)
    assert done.returncode == 1, done.stderr
    assert [skipped(run)[step] for step in (2, 3, 9)] == [0, 1, 1]
    [record] = read_records(run / "quarantine.jsonl")
    assert (record["step"], record["reason"], record["grad_norm"]) == (3, "nonfinite", None)
    [line] = [line for line in done.stderr.splitlines() if "other numbers" in line]
    assert "found that replicas differ: step 10: rank 1 has other numbers than rank 0 in " in line
    assert "model.embed_tokens.weight" in line
    assert "Traceback" not in done.stderr
    assert incomplete_reason(run / "checkpoints/step-00000005", verify="full") is None
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000005"]
    assert read_run_file(run)["status"] == "failed"


@SLOW
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_one_rank_finds_is_trained_by_none(strategy, run_with_faults):
    """The weights of the step before, on all: the checkpoint is put together by all."""
    done, run = run_with_faults(f"strategy={strategy}", "save_every=1", "max_steps=3", flip_at=99)
    assert done.returncode == 0, done.stderr
    assert equal(weights(run, 2), weights(run, 3))
    assert not equal(weights(run, 1), weights(run, 2))


@SLOW
def test_a_loss_scaler_that_skips_skips_everywhere(run_with_faults):
    done, run = run_with_faults(
        *("strategy=ddp", "precision=16-mixed", "precision.allow_cpu=true", "max_steps=8"), flip_at=99
    )
    assert done.returncode == 0, done.stderr
    found = skipped(run)
    assert found[3] == found[2] + 1


@SLOW
def test_ranks_that_may_differ(run_with_faults):
    done, _ = run_with_faults("strategy=ddp", "guard.replicas=ignore", "max_steps=11")
    assert done.returncode == 0, done.stderr


# -- one process, by itself ---------------------------------------------------------------------------------------------


class Others:
    """A world of ``size`` ranks whose other members hold what this one holds, but for what ``change`` makes of it."""

    device = torch.device("cpu")

    def __init__(self, size, change):
        self.size, self.change, self.asked = size, change, 0

    def all_gather_object(self, work):
        self.asked += 1
        mine = work()
        if isinstance(mine, dict):
            return [self.change(rank, mine) for rank in range(self.size)]
        changed = {rank for rank in range(self.size) if self.change(rank, {"w from 0": 1}) != {"w from 0": 1}}
        return [(mine[0], f"{mine[1]}{'x' * (rank in changed)}") for rank in range(self.size)]


class Engine:
    def __init__(self, world):
        self.world = world

    def replicated(self):
        yield "w", torch.ones(3)
        yield "b", torch.zeros(())


@pytest.mark.parametrize(
    ("size", "changed", "says"),
    [
        (2, {1}, "rank 1 has other numbers than rank 0 in w:"),
        (2, {0}, "rank 1 has other numbers than rank 0 in w:"),
        (4, {0}, "rank 0 has other numbers than rank 1, 2, 3 in w:"),
        (8, {2, 5}, "rank 2, 5 has other numbers than rank 0, 1, 3 and 3 more in w:"),
    ],
)
def test_the_minority_is_named(size, changed, says):
    from pretrain.runtime.errors import ReplicasDiffer
    from pretrain.training.guard.replicas import check_replicas

    world = Others(size, lambda rank, sums: sums | {"w from 0": 7} if rank in changed else sums)
    with pytest.raises(ReplicasDiffer, match=f"^step 9: {says}"):
        check_replicas(Engine(world), 9)


def test_equal_replicas_exchange_two_words():
    from pretrain.training.guard.replicas import check_replicas

    world = Others(4, lambda rank, sums: sums)
    check_replicas(Engine(world), 9)
    assert world.asked == 1


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]),
    st.integers(1, 40),
    st.integers(0, 10**6),
)
def test_one_flipped_bit_changes_the_checksum(dtype, length, where):
    tensor = torch.randn(length).mul(50).to(dtype)
    before = checksum(tensor)
    assert before.dtype == torch.int64
    assert torch.equal(before, checksum(tensor.clone()))
    bits = tensor.view(torch.uint8)
    bits[where % len(bits)] ^= 1 << where % 8
    assert not torch.equal(before, checksum(tensor))


def test_a_tensor_of_nothing_has_a_checksum():
    assert int(checksum(torch.empty(0, 4))) == 0


def test_a_large_tensor_is_summed_in_parts(monkeypatch):
    from pretrain.distributed import sharding as tensors

    tensor = torch.randn(1000)
    expected = checksum(tensor)
    monkeypatch.setattr(tensors, "CHECKSUM_NUMBERS", 64)
    assert torch.equal(checksum(tensor), expected)


def test_alone_nothing_is_compared(base_arguments, command, tmp_path, monkeypatch):
    """One process has no other: no checksum, no collective, the same numbers."""
    from pretrain.training.guard import replicas

    monkeypatch.setattr(replicas, "checksum", None)
    code, _, err = command([*base_arguments, f"output_dir={tmp_path / 'run'}", "max_steps=2", "sink=jsonl"])
    assert code == 0, err
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
    assert os.environ.get("RANK") is None
