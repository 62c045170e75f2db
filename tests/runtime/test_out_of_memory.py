"""Memory that really runs out, in a process that may have no more: one line with what would fit, and that does."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.config.compose import run_config
from pretrain.run.memory_advice import explained
from pretrain.runtime import memory
from pretrain.runtime.out_of_memory import OutOfMemory, numbers, watched
from pretrain.strategy.ddp import Ddp
from pretrain.strategy.fsdp import Fsdp
from pretrain.telemetry.run_file import read_run_file
from pretrain.training.micro_batching import MicroBatching

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 1200  # beyond the libraries': 64 sequences of the wide model need 1.6 GiB, 32 of them half
WIDE = ["model=scratch", "model.overrides.intermediate_size=32768", "model.overrides.num_hidden_layers=1"]
SHORT = ["max_steps=1", "evaluation.batch_size=2", "gradient_accumulation_steps=1", "sink=jsonl"]


@pytest.fixture
def words(base_arguments, tmp_path):
    return [*base_arguments, *WIDE, *SHORT, f"output_dir={tmp_path / 'run'}"]


@pytest.fixture
def limited(command, words):
    """``limited(arguments)``: the run of a wide model in little memory → exit code, what it said."""
    before = resource.getrlimit(resource.RLIMIT_AS)

    def run(*arguments):
        taken = memory.read_kib(Path("/proc/self/status"), "VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_MIB * 2**20, before[1]))
        try:
            code, _, said = command([*words, *arguments])
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        return code, said

    return run


def test_the_settings_that_are_proposed_do_fit(limited, tmp_path):
    code, said = limited("batch_size=64")
    assert code == 2, said
    assert said.count("error: ") == 1
    told = re.search(
        r"^error: out of memory at step 1 with batch_size=64 × sequence_length=32 on cpu: tried to al", said, re.M
    )
    assert told, said
    assert re.search(r"allocate [\d.]+ [MG]iB, [\d.]+ [MG]iB in use; batch_size=", said)
    assert "about 1/2 of the activations; less still with model.gradient_checkpointing=true" in said
    assert read_run_file(tmp_path / "run")["status"] == "failed"

    proposed = re.search(r"(batch_size=\d+) (gradient_accumulation_steps=\d+)", said)
    code, said = limited(*proposed.groups())
    assert code == 0, said
    facts = read_run_file(tmp_path / "run")
    assert (facts["status"], facts["batch_size"], facts["gradient_accumulation_steps"]) == ("finished", 32, 2)


@pytest.mark.slow
def test_auto_finds_what_fits(limited, tmp_path):
    """A trial of a size that does not fit leaves a run that goes well."""
    code, said = limited("batch_size=auto", "gradient_accumulation_steps=64")
    assert code == 0, said
    size = re.search(r"batch_size=auto: batch_size=(\d+) .* \(larger ones do not fit: ", said)
    assert int(size[1]) in (16, 32), said
    assert read_run_file(tmp_path / "run")["batch_size"] == int(size[1])


@pytest.mark.slow
def test_on_ranks_it_is_said_once_and_not_tried_again(words, tmp_path):
    """As processes of their own: workers are forked from a server, which would be older than the limit."""
    words += ["batch_size=64", "strategy=ddp", "devices=2", "launch.max_restarts=3"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.limited", str(LIMIT_MIB), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        timeout=250,
    )
    said = done.stdout
    assert done.returncode == 2, said
    assert said.count("out of memory") == 1
    assert "start again" not in said
    assert "strategy=fsdp" in said
    assert read_run_file(tmp_path / "run")["status"] == "failed"


def test_in_the_evaluation(limited, tmp_path):
    wider = "model.overrides.intermediate_size=524288"
    code, said = limited("batch_size=1", "evaluation.batch_size=64", "evaluation.max_tokens=2000", wider)
    assert code == 2, said
    assert "in the evaluation after step 0 with evaluation.batch_size=64" in said
    assert "evaluation.batch_size=32 gives the same scores" in said


def test_while_the_model_is_built(limited):
    code, said = limited("batch_size=1", "model.overrides.hidden_size=8192")
    assert code == 2, said
    assert said.startswith("error: out of memory while the model was being built on cpu: tried to allocate")


CUDA = (  # as torch 2.9 says it
    "CUDA out of memory. Tried to allocate 3.10 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free. "
    "Including non-PyTorch memory, this process has 77.85 GiB memory in use. Of the allocated memory 70.00 GiB is "
    "allocated by PyTorch"
)


def config_of(*words):
    return run_config(["sequence_length=2048", "precision=32-true", *words])


def told(doing, size, accumulation, **more):
    given = {"memory_saving_overrides": [], "device": torch.device("cuda:0"), "step": 0} | more
    failure = OutOfMemory(doing, numbers(torch.OutOfMemoryError(CUDA)))
    config = given.pop("config", None) or config_of()
    return str(explained(failure, config, split=MicroBatching(size, accumulation), **given))


def test_a_gpu():
    assert told("step", 8, 4, memory_saving_overrides=["strategy=fsdp"]) == (
        "out of memory at step 1 with batch_size=8 × sequence_length=2048 on cuda:0: tried to allocate 3.10 GiB, "
        "1.25 GiB of 79.10 GiB free; batch_size=4 gradient_accumulation_steps=8 keeps the global batch with about 1/2 of "
        "the activations; less still with model.gradient_checkpointing=true (or selective, which is faster), "
        "precision=bf16-mixed, model.activation_offload=true (slower), strategy=fsdp"
    )


def test_the_plan_is_quoted():
    plan = {"peak_bytes": 41.2 * 2**30, "device": {"is_gpu": True, "memory_bytes": 80 << 30}}
    assert "79.10 GiB free; the plan expects 41.2 GiB of 80.0 GiB; batch_size=4 " in told("step", 8, 4, plan=plan)


def test_one_sequence_can_not_be_halved():
    said = told("step", 1, 4, step=7, config=config_of("model.gradient_checkpointing=true"))
    assert said.startswith("out of memory at step 8 with batch_size=1")
    assert said.endswith(
        "; less is needed with precision=bf16-mixed, model.activation_offload=true (slower), a shorter sequence_length (another "
        "run); the run resumes from its last checkpoint"
    )


@pytest.mark.parametrize(
    ("size", "accumulation", "smaller"), [(3, 1, (1, 3)), (6, 1, (3, 2)), (5, 2, (2, 5)), (2, 3, (1, 6))]
)
def test_a_smaller_split_of_the_same_batch(size, accumulation, smaller):
    assert MicroBatching(size, accumulation).smaller() == MicroBatching(*smaller)


def test_a_strategy_offers_what_it_has_not_yet():
    from pretrain.distributed.topology import Topology
    from pretrain.strategy.base import StepConfig

    step = StepConfig()
    assert Ddp().memory_saving_overrides(step, Topology(workers_per_node=2)) == ["strategy=fsdp"]
    assert Ddp().memory_saving_overrides(step, Topology(workers_per_node=1)) == []
    assert Fsdp().memory_saving_overrides(step, Topology(workers_per_node=2)) == []
    assert Fsdp(sharding_strategy="NO_SHARD").memory_saving_overrides(step, Topology(workers_per_node=2)) == [
        "strategy.sharding_strategy=FULL_SHARD"
    ]
    assert Fsdp().memory_saving_overrides(step, Topology(workers_per_node=2, device_type="cuda")) == [
        "strategy.cpu_offload=true"
    ]


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape") as raised, watched("step"):
        raise RuntimeError("shape '[2]' is invalid")
    assert not isinstance(raised.value, OutOfMemory)


def test_the_innermost_knows_best():
    with pytest.raises(OutOfMemory) as raised, watched("run"), watched("step"):
        torch.empty(2**45)
    assert raised.value.doing == "step"
    assert "tried to allocate 131072.0 GiB" in str(raised.value)


def test_what_a_cgroup_leaves(tmp_path):
    inside = tmp_path / "job/step"
    inside.mkdir(parents=True)
    for folder, limit, used in ((inside, "max", 10), (tmp_path / "job", 1000, 400)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory/old").mkdir(parents=True)
    (tmp_path / "memory/old/memory.limit_in_bytes").write_text("500\n")
    (tmp_path / "memory/old/memory.usage_in_bytes").write_text("450\n")
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/old\n2:cpu:/job\n0::/job/step\n")
    assert list(memory.cgroup_bytes(own, tmp_path)) == [50, 600]


def test_the_memory_of_this_process():
    """Only on Linux are there answers; the peak is of what came after the reset."""
    assert memory.available_bytes() > 2**20
    taken = torch.ones(2**24)
    del taken
    memory.reset_peak()
    before = memory.peak_bytes()
    taken = torch.ones(2**25)
    assert memory.peak_bytes() - before > 2**26
    assert memory.resident_bytes() <= memory.peak_bytes()
    del taken
