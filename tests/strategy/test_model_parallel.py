"""Ranks that share a replica of the model compute on the same data, and what they compute is counted once."""

import pytest

from pretrain.distributed.context import DistributedContext
from pretrain.distributed.topology import Topology
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records

NUMBERS = ("event", "step", "domain", "loss", "grad_norm", "tokens", "epoch", "perplexity")


def numbers_of(run) -> list[dict]:
    found = [r for r in read_records(run / "metrics.jsonl") if r["event"] in ("train", "evaluation", "data")]
    return [{key: record[key] for key in (*NUMBERS, "sources") if key in record} for record in found]


def test_a_replica_on_two_ranks_equals_one_process(command, base_arguments, tmp_path):
    more = ["max_steps=4", "evaluate_every=2", "save_every=2", "gradient_accumulation_steps=2", "sink=[jsonl]"]
    twins = ["devices=2", "strategy._target_=tests.twins.Twins", "allow_targets=[tests.twins]"]
    for name, words in {"alone": [], "twins": twins, "resumed": twins}.items():
        run = tmp_path / ("twins" if name == "resumed" else name)
        steps = ["max_steps=6"] if name == "resumed" else []
        code, _, err = command([*base_arguments, *more, *words, *steps, f"output_dir={run}"])
        assert code == 0, err
        if name == "twins":
            assert numbers_of(run) == numbers_of(tmp_path / "alone")
            facts = read_run_file(run)
            assert (facts["world_size"], facts["devices"]) == (2, 2)
    assert [r["step"] for r in numbers_of(tmp_path / "twins") if r["event"] == "train"][-1] == 6


def test_three_processes_are_not_divided_into_pairs(command, base_arguments, tmp_path):
    words = ["devices=3", "strategy._target_=tests.twins.Twins", "allow_targets=[tests.twins]"]
    code, _, err = command([*base_arguments, *words, f"output_dir={tmp_path / 'run'}"])
    assert code == 2
    assert (
        "strategy=twins: 2 ranks share one replica of the model; 3 processes can't be divided into such groups" in err
    )


@pytest.mark.parametrize(
    ("size", "group", "expected"), [(4, 1, [0, 1, 2, 3]), (4, 2, [0, 0, 1, 1]), (6, 3, [0] * 3 + [1] * 3)]
)
def test_the_share_of_the_data_of_each_rank(size, group, expected):
    topology = Topology(workers_per_node=size, model_parallel_size=group)
    ranks = [DistributedContext(rank, topology) for rank in range(size)]
    assert [rank.data_rank for rank in ranks] == expected
    assert {rank.data_size for rank in ranks} == {size // group}
    assert sum(rank.is_data_leader for rank in ranks) == size // group
    assert topology.data_parallel_devices == size // group
