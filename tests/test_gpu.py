"""Runs on a GPU: `pytest -m gpu` on a machine that has one. What a CPU shows as well is tested there, elsewhere."""

import os
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import pretrain
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.launch.test_joined import torchrun
from tests.runs import at_call, injected, losses, numbers, wait_for
from tests.test_parity import BF16, FP32, STRATEGIES, arguments, assert_equal_runs

if not torch.cuda.is_available():
    pytest.skip("need a GPU, and `pytest -m gpu`", allow_module_level=True)
pytestmark = pytest.mark.gpu

OTHERS = [
    *([f"strategy={name}"] for name in STRATEGIES if name not in ("single", "deepspeed")),
    ["strategy=fsdp", "strategy.sharding_strategy=SHARD_GRAD_OP"],
    ["strategy=fsdp", "strategy.sharding_strategy=NO_SHARD"],
    ["strategy=fsdp", "strategy.cpu_offload=true"],
    *(["strategy=deepspeed", f"strategy.zero_stage={stage}"] for stage in range(4)),
    ["strategy=deepspeed", "strategy.zero_stage=2", "strategy.offload_optimizer=true"],
    ["strategy=deepspeed", "strategy.zero_stage=3", "strategy.offload_parameters=true"],
]
BOUNDS = {"32-true": FP32, "bf16-mixed": BF16, "16-mixed": BF16}
REFUSED = (["strategy=fsdp", "strategy.cpu_offload=true"], "16-mixed")  # tests/strategy/test_fsdp.py says why


@pytest.fixture
def ran(spawn, tmp_path):
    """``ran(name, arguments)``: the folder of a run, a process of its own, that must end well; and all it said."""

    def run(name, arguments, **options):
        process = spawn([*arguments, f"output_dir={tmp_path / name}"], **options)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        return tmp_path / name, out

    return run


@pytest.fixture
def given(base_arguments, exact_model, tmp_path):
    return [*arguments(base_arguments, exact_model("llama-tied"), tmp_path), "batch_size=4"]


@pytest.fixture(scope="module")
def references():
    return {}


@pytest.fixture
def reference(references, given, ran, tmp_path_factory):
    """``reference(precision)``: the folder of the run of strategy=single."""

    def run(precision):
        if precision not in references:
            references[precision] = tmp_path_factory.mktemp("gpu") / "run"
            shutil.copytree(ran("reference", [*given, f"precision={precision}"])[0], references[precision])
        return references[precision]

    return run


@pytest.mark.parametrize(
    ("strategy", "precision"), [pair for pair in product(OTHERS, sorted(BOUNDS)) if pair != REFUSED]
)
def test_every_strategy_equals_single(strategy, precision, given, reference, ran):
    run, _ = ran("run", [*given, *strategy, f"precision={precision}"])
    assert read_run_file(run)["device"] != "cpu"
    assert_equal_runs(run, reference(precision), **BOUNDS[precision])


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_weights_on_the_host_with_an_optimizer_of_matrices(optimizer, given, ran):
    """The shards are on the host, the mesh is of GPUs."""
    chosen = [*given, f"optimizer={optimizer}"]
    single, _ = ran("single", chosen)
    offloaded, _ = ran("offloaded", [*chosen, "strategy=fsdp", "strategy.cpu_offload=true"])
    assert_equal_runs(offloaded, single, **BF16)


@pytest.mark.parametrize(
    "strategy",
    [["strategy=fsdp"], ["strategy=deepspeed", "strategy.zero_stage=2", "strategy.offload_optimizer=true"]],
    ids=range(2),
)
def test_levers_on_the_host(strategy, given, ran):
    """The frozen base model under fsdp, and averages and terms of ZeRO's shards, whose weights are on the host."""
    levers = ["objective=l2_to_base", "hook=[ema]", "merge.curve=[0,0.5,1]"]
    single, _ = ran("single", [*given, *levers])
    run, _ = ran("run", [*given, *levers, *strategy])
    assert_equal_runs(run, single, **FP32)
    kl = [*given, "objective=kl_to_base"]
    ours, _ = ran("on-host", [*kl, "strategy=fsdp", "objective.base_offload=true"])
    theirs, _ = ran("on-device", [*kl, "strategy=fsdp"])
    assert losses(ours) == losses(theirs)


def test_a_gpu_equals_a_cpu(given, reference, ran):
    run, _ = ran("run", given, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert_equal_runs(run, reference("32-true"), loss=1e-4, norm=1e-3, weights=1e-3)


def test_tf32_is_used_when_asked_for(given, reference, ran):
    run, _ = ran("run", [*given, "precision.tf32=true"])
    difference = max(abs(a - b) for a, b in zip(losses(run), losses(reference("32-true")), strict=True))
    assert 0 < difference < BF16["loss"]


STRICT = """
import torch

import pretrain
from pretrain.cli.main import program
from pretrain.telemetry.events import StepDone
from pretrain.training.trainer import Trainer

def strictly(work, due):
    def strict(self, given):
        torch.cuda.set_sync_debug_mode("error" if due(self, given) else "default")
        try:
            return work(self, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return strict

steps = range(3, 19)  # the first sets itself up, the last is logged
Trainer.train_step = strictly(Trainer.train_step, lambda self, batch: self.state.step in steps)
Trainer.emit = strictly(Trainer.emit, lambda self, event: isinstance(event, StepDone) and event.step in steps)
program()
"""


@pytest.mark.parametrize("documents", ["true", "false"])
@pytest.mark.parametrize("precision", sorted(BOUNDS))
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_no_step_waits_for_the_device(strategy, precision, documents, base_arguments, exact_model, tmp_path):
    """From one log step to the next; torch makes an error of whatever would wait."""
    chosen = [f"model_name={exact_model('llama')}", f"strategy={strategy}", f"precision={precision}", "sink=jsonl"]
    rarely = ["log_every=1000", "evaluate_every=null", "evaluation.per_epoch=null", "save_every=null"]
    command = [sys.executable, "-c", STRICT, *base_arguments, *chosen, *rarely, f"dataset.document_mask={documents}"]
    done = subprocess.run(
        [*command, f"output_dir={tmp_path / 'run'}"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("strategy", ["single", "fsdp", "deepspeed"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_kill_9_and_the_same_command(strategy, precision, base_arguments, ran, spawn, tmp_path):
    """The model has dropout: a lost random state of the GPU would show in the very next loss. So would a lost loss scale."""
    same = [*base_arguments, f"strategy={strategy}", f"precision={precision}", "save_every=5"]
    whole, _ = ran("whole", same)
    mark = tmp_path / "mark"
    killed = spawn(
        [*same, f"output_dir={tmp_path / 'run'}"],
        env=at_call("pretrain.training.trainer:Trainer.train_step", "kill", mark, at=13),
    )
    out, _ = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, out
    assert mark.exists()
    run, _ = ran("run", same)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5 if precision == "32-true" else 1e-2)
    scales = [
        [r["loss_scale"] for r in read_records(f / "metrics.jsonl") if r["event"] == "train"] for f in (run, whole)
    ]
    assert scales[0] == scales[1]


def test_single_goes_on_bit_for_bit(given, ran, spawn, tmp_path):
    whole, _ = ran("whole", [*given, "save_every=5"])
    mark = tmp_path / "mark"
    environment = at_call("pretrain.training.trainer:Trainer.train_step", "kill", mark, at=8)
    same = [*given, "save_every=5", "resume=auto"]
    spawn([*same, f"output_dir={tmp_path / 'run'}"], env=environment).wait(timeout=300)
    assert mark.exists()
    run, _ = ran("run", same)
    assert numbers(run) == numbers(whole)


def test_sigterm_saves_and_exits_75(base_arguments, ran, spawn, tmp_path):
    same = [*base_arguments, "max_steps=20000", "save_every=null", "evaluate_every=null", "evaluation.per_epoch=null"]
    process = spawn([*same, f"output_dir={tmp_path / 'run'}"])
    wait_for(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 75, out
    assert list((tmp_path / "run/checkpoints").glob("step-*/COMPLETE.json"))


def test_the_monitor_knows_the_device(given, ran):
    run, _ = ran("run", [*given, "precision=bf16-mixed", "max_steps=20"])
    train = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "train"][5:]
    for record in train:
        assert 0 < record["memory_gib"] <= record["memory_reserved_gib"] < 10
        parts = sum(record[f"{part}_seconds"] for part in ("data", "communication", "compute", "optimizer"))
        assert 0 < parts < 1.5 * record["step_seconds"]
        assert record["mfu"] is None or 0 < record["mfu"] < 1


def test_compiled_equals_eager(given, reference, ran):
    run, _ = ran("run", [*given, "precision=bf16-mixed", "model.compile=true"])
    assert_equal_runs(run, reference("bf16-mixed"), **BF16)


@pytest.fixture
def little_memory(tmp_path):
    """``little_memory(mib)``: the environment of a process to which the GPU refuses more."""

    def limit(mib):
        share = mib * 2**20 / torch.cuda.get_device_properties(0).total_memory
        return injected(tmp_path, f"import torch\ntorch.cuda.set_per_process_memory_fraction({share})\n")

    return limit


def test_out_of_memory_is_told_with_what_would_fit(base_arguments, little_memory, spawn, tmp_path):
    large = ["batch_size=64", "sequence_length=128", f"output_dir={tmp_path / 'run'}"]
    out, _ = (process := spawn([*base_arguments, *large], env=little_memory(64))).communicate(timeout=300)
    assert process.returncode == 2, out
    (error,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "out of memory at step 1 with batch_size=64 × sequence_length=128 on cuda:0: tried to allocate" in error
    assert "batch_size=32 gradient_accumulation_steps=4 keeps the global batch" in error


def test_auto_finds_what_fits(base_arguments, little_memory, ran):
    auto = ["batch_size=auto", "gradient_accumulation_steps=512", "max_steps=2"]
    run, out = ran("run", [*base_arguments, *auto], env=little_memory(128))  # cuBLAS alone takes 32
    assert "(larger ones do not fit: tried to allocate" in out
    assert 1 <= read_run_file(run)["batch_size"] < 512


def test_torchrun_with_one_process(given, reference, tmp_path):
    run = tmp_path / "joined"
    done = torchrun([*given, "strategy=fsdp", f"output_dir={run}"], "--nproc_per_node=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal_runs(run, reference("32-true"), **FP32)


def test_more_devices_than_gpus(given, spawn):
    count = torch.cuda.device_count()
    process = spawn([*given, "strategy=ddp", f"devices={count + 1}"])
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 2, out
    assert f"error: devices={count + 1}: {count} GPU" in out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.gradient_checkpointing=true"],
        ["precision=bf16-true"],
        ["gradient_accumulation_steps=2", "strategy=ddp"],
    ],
    ids=["mixed", "checkpointing", "bf16", "ddp"],
)
def test_a_plan_is_right_within_five_percent(words, tmp_path):
    """Of what torch's allocator had allocated at most in two real steps."""
    from pretrain.distributed.context import leave
    from pretrain.distributed.rank_info import RankInfo
    from pretrain.distributed.topology import Topology
    from pretrain.plan.devices import this_device
    from pretrain.run import build
    from pretrain.run.planning import plan_of
    from pretrain.run.prepare import Prepared, model_spec

    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from bench_plan import random_batch

    shape = "{model_type: llama, hidden_size: 1024, intermediate_size: 2816, num_hidden_layers: 12, num_attention_heads: 16, "
    shape += "num_key_value_heads: 4, vocab_size: 32000, max_position_embeddings: 2048}"
    base = [
        "model=scratch",
        f"model.overrides={shape}",
        f"output_dir={tmp_path}",
        "sequence_length=1024",
        "batch_size=8",
    ]
    config = pretrain.compose([*base, "precision=bf16-mixed", "plan.devices=[]", *words]).with_lr(1e-4)
    topology = Topology("cuda")
    predicted = plan_of(config, device=this_device(), topology=topology, compare=False).peak_bytes
    world = build.build_world(config, RankInfo(topology=topology), group=config.strategy.needs_group)
    try:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine = build.build_engine(config, Prepared(model_spec(config), *[None] * 5), world)
        for _ in range(2):
            engine.train_step(random_batch(config))
        measured = torch.cuda.max_memory_allocated() - before
    finally:
        leave()
    assert predicted == pytest.approx(measured, rel=0.05)


def test_the_kernels_of_attention_are_chosen_and_named(given, ran):
    """The same losses as with the kernels that torch chooses, to the rounding of bf16; compiled too."""
    plain, _ = ran("plain", [*given, "precision=bf16-mixed", "model.attention=sdpa"])
    for name, words in {"eager": [], "compiled": ["model.compile=true"]}.items():
        run, _ = ran(name, [*given, "precision=bf16-mixed", *words])
        assert read_run_file(run)["attention"] in {f"sdpa ({kernel})" for kernel in ("cudnn", "flash", "FA3", "FA4")}
        assert_equal_runs(run, plain, **BF16)
