"""Mixtures of experts under every strategy: the same losses with a load balancing loss, and with weights that stay in fp32."""

import pytest
import torch
from safetensors.torch import load_file

from pretrain.telemetry.sinks.jsonl import read_records
from tests.models.architectures import tiny

pytestmark = pytest.mark.slow  # two processes each


@pytest.fixture
def run(base_arguments, command, tokenizer, tmp_path):
    """``run(name, *arguments)``: the losses and the weights of 10 steps of a tiny model, at a global batch of 8."""

    def start(name, *arguments, **changes):
        folder = tmp_path / "model"
        if not folder.exists():
            tiny(name, vocab_size=300, **changes).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        given = [*base_arguments, f"model_name={folder}", f"output_dir={out}", "max_steps=10", "evaluate_every=null"]
        code, _, err = command([*given, "save_every=null", "sink=jsonl", *arguments])
        assert code == 0, err
        losses = [r["loss"] for r in read_records(out / "metrics.jsonl") if r["event"] == "train"]
        assert len(losses) == 10
        return losses, load_file(out / "model" / "model.safetensors")

    return start


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_the_balancing_loss_is_the_same(strategy, run):
    """Micro-batches of 2 sequences in one process and in two: the same ones, in another order."""
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    alone, _ = run("mixtral", "strategy=single", "gradient_accumulation_steps=4", **asked)
    found, _ = run("mixtral", f"strategy={strategy}", "devices=2", "gradient_accumulation_steps=2")
    assert found == pytest.approx(alone, rel=2e-4)


def test_fp32_weights_of_a_16_bit_model_are_the_same(run):
    given = ("precision=bf16-true", "devices=2", "gradient_accumulation_steps=2")
    unused = "strategy.find_unused_parameters=true"  # its correction bias has no gradient
    alone, weights = run("ernie4_5_moe", "strategy=ddp", unused, *given)
    found, sharded = run("ernie4_5_moe", "strategy=fsdp", *given)
    assert found == pytest.approx(alone, rel=5e-3)
    assert {n: t.dtype for n, t in sharded.items()} == {n: t.dtype for n, t in weights.items()}
    gates = [name for name in weights if name.endswith("gate.weight")]
    assert gates
    for name in gates:
        assert weights[name].dtype == torch.float32
        assert not torch.equal(weights[name], weights[name].bfloat16().float())
        assert torch.allclose(sharded[name], weights[name], atol=3e-3), name
