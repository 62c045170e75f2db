"""One checkpoint format for all: a run handed from strategy to strategy and from world size to world size goes on as if
nothing had happened, and ends where the run in one process ends."""

import subprocess
import sys

import pytest
import torch

from pretrain.checkpoint.store import load
from pretrain.telemetry.jsonl import read_records
from tests.test_parity import STRATEGIES, whole_model

FSDP = ["strategy=fsdp"]
LEGS = {  # a leg: strategy and options, number of processes. Every kind saves for, and loads from, another kind and size.
    "ddp and fsdp": [
        (["strategy=single"], 1),
        (FSDP, 2),
        (["strategy=ddp"], 4),
        ([*FSDP, "strategy.sharding_strategy=HYBRID_SHARD"], 4),
        ([*FSDP, "strategy.sharding_strategy=SHARD_GRAD_OP"], 1),
        ([*FSDP, "strategy.sharding_strategy=NO_SHARD"], 2),
        (FSDP, 4),
        (["strategy=ddp"], 2),
        ([*FSDP, "strategy.cpu_offload=true"], 2),
        (["strategy=dp"], 1),
    ],
    "deepspeed": [
        (["strategy=deepspeed", "strategy.zero_stage=3"], 2),
        (["strategy=single"], 1),
        (["strategy=deepspeed", "strategy.zero_stage=0"], 2),
        (["strategy=deepspeed", "strategy.zero_stage=1"], 4),
        (FSDP, 2),
        (["strategy=deepspeed", "strategy.zero_stage=2"], 2),
        (["strategy=deepspeed", "strategy.zero_stage=3", "strategy.offload_optimizer=true"], 4),
        (["strategy=deepspeed", "strategy.zero_stage=1"], 1),
        (["strategy=ddp"], 2),
        (["strategy=deepspeed", "strategy.zero_stage=3"], 1),
        (["strategy=deepspeed", "strategy.zero_stage=2", "strategy.offload_optimizer=true"], 2),
    ],
}


def split(processes):
    """The same global batch of 8 sequences."""
    return [f"devices={processes}", f"batch_size={4 // processes}", "gradient_accumulation_steps=2"]


def in_a_process(arguments):
    done = subprocess.run([sys.executable, "-m", "pretrain", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("shape", ["llama-tied", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ddp and fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_run_handed_on(name, shape, base_arguments, exact_model, command, tmp_path):
    legs = LEGS[name]
    common = [*base_arguments, f"model_name={exact_model(shape)}", "scheduler=constant", "warmup_proportion=0"]
    common += ["evaluate_every=null", "save_every=null", "dataset.document_mask=true", "sink=jsonl"]
    steps = 2 * len(legs)
    code, _, err = command([*common, f"output_dir={tmp_path / 'alone'}", *split(1), f"max_steps={steps}"])
    assert code == 0, err
    for leg, (strategy, processes) in enumerate(legs, start=1):
        handed = [*common, f"output_dir={tmp_path / 'handed'}", *strategy, *split(processes)]
        # A process that has been in a group of its own is not used again: DeepSpeed remembers its groups.
        start = in_a_process if processes == 1 else command
        code, _, err = start([*handed, f"max_steps={2 * leg}"])
        assert code == 0, f"{strategy} × {processes}: {err}"

    alone, handed = (train_records(tmp_path / run) for run in ("alone", "handed"))
    assert [r["step"] for r in handed] == list(range(1, steps + 1))
    for a, b in zip(handed, alone, strict=True):
        where = f"step {a['step']}, {legs[(a['step'] - 1) // 2]}"
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), where
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), where
    last = f"checkpoints/step-{steps:08d}"
    states = [load(tmp_path / run / last)["engine"] for run in ("handed", "alone")]
    for kind in ("model", "optimizer"):
        ours, theirs = (state[kind] for state in states)
        assert ours.keys() == theirs.keys()
        for key in sorted(ours.keys()):
            assert ours.shape(key) == theirs.shape(key)
            assert torch.allclose(ours.read(key), theirs.read(key), rtol=1e-3, atol=2e-5), key
    models = [whole_model(tmp_path / run / "model") for run in ("handed", "alone")]
    assert all(torch.allclose(models[0][n], models[1][n], atol=2e-5) for n in models[1])


def train_records(run):
    return [r for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s not in ("single", "dp")])
def test_the_final_model_opens_with_from_pretrained(strategy, base_arguments, exact_model, command, tmp_path):
    """And starts the next run, as any Hugging Face folder does: sharded or whole, tied as it was."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = [*base_arguments, f"strategy={strategy}", "devices=2", "batch_size=2", "sink=jsonl", "save_every=null"]
    common += ["strategy.state_dict_type=sharded"] if strategy != "ddp" else []
    code, _, err = command(
        [*common, f"model_name={exact_model('llama-tied')}", f"output_dir={tmp_path / 'a'}", "max_steps=2"]
    )
    assert code == 0, err
    folder = tmp_path / "a" / "model"
    assert len(list(folder.glob("model*.safetensors"))) == (1 if strategy == "ddp" else 2)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    assert len(AutoTokenizer.from_pretrained(folder)) == 300
    code, _, err = command([*common, f"model_name={folder}", f"output_dir={tmp_path / 'b'}", "max_steps=1"])
    assert code == 0, err
    scores = [r for run in "ab" for r in read_records(tmp_path / run / "metrics.jsonl") if r["event"] == "evaluation"]
    before = {r["domain"]: r["loss"] for r in scores[-4:] if r["step"] == 0}
    after = {r["domain"]: r["loss"] for r in scores[:4] if r["step"] == 2}
    assert before == pytest.approx(after, abs=1e-6)
