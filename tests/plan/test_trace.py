"""What a step on fake tensors needs is what a real step needs, of any number of sequences, layers and ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

import pretrain
from pretrain.data.batch import Batch
from pretrain.distributed.context import DistributedContext
from pretrain.distributed.topology import Topology
from pretrain.plan.cuda_operators import CudaOperators
from pretrain.plan.memory import step_memory
from pretrain.plan.storages import StorageTracker
from pretrain.plan.torch_internals import fake_tensors
from pretrain.plan.trace import Traced
from pretrain.plan.traced_model import has_copied_head, period_of, traced_spec, with_layers
from pretrain.run.build import optimizer_builder
from pretrain.strategy.base import StepConfig
from pretrain.training.batch_size import moment_bytes
from tests.conftest import SHAPES

LENGTH = 32


def config_of(folder, *words):
    return pretrain.compose([f"model_name={folder}", f"sequence_length={LENGTH}", "batch_size=4", *words]).with_lr(1e-3)


def traced_with(config, topology=Topology(), *, is_gpu=False):
    return Traced(config, config.model, optimizer_builder(config), topology, is_gpu).with_fused_loss()


def real_peak(config):
    """Return the largest sum of the real tensors of a step, the moments of which exist."""
    from pretrain.run.build import build_model_factory

    tracker, rows = StorageTracker(), config.batch_size * config.gradient_accumulation_steps
    with tracker:
        factory = build_model_factory(config, config.model, config.transforms)
        engine = config.strategy.setup(factory, optimizer_builder(config), StepConfig.of(config), DistributedContext())
        tracker.tag([*engine.model.parameters(), *engine.model.buffers()], "weights")
        for _ in range(2):
            tracker.restart()
            ids = torch.randint(0, 300, (rows, LENGTH))
            positions = torch.arange(LENGTH).remainder(9).expand(rows, -1) if config.dataset.document_mask else None
            batch = Batch(ids, ids, positions, num_targets=ids.numel(), micro_batch_size=config.batch_size)
            engine.train_step(batch)
    return max(usage.total for usage in tracker.usage().values())


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        pytest.param("llama", [], marks=pytest.mark.slow),
        ("llama-tied", ["gradient_accumulation_steps=2", "model.gradient_checkpointing=true", "precision=bf16-mixed"]),
        pytest.param("gpt2", ["precision=bf16-true", "dataset.document_mask=true"], marks=pytest.mark.slow),
        pytest.param("gpt2", ["model.attention=eager", "gradient_accumulation_steps=2"], marks=pytest.mark.slow),
    ],
    ids=["llama", "checkpointing", "mask", "eager"],
)
def test_a_trace_needs_what_a_real_step_needs(exact_model, shape, words):
    config = config_of(exact_model(shape), *words)
    usage = traced_with(config).step(config.batch_size, traced_spec(config.model)).usage
    # A real step also has the batch of all micro-batches.
    assert max(phase.total for phase in usage.values()) == pytest.approx(real_peak(config), rel=0.01)


@pytest.mark.slow
def test_peaks_are_linear_in_sequences_and_layers(exact_model):
    config = config_of(
        exact_model("llama"), "precision=bf16-mixed", "model=scratch", "model.overrides={num_hidden_layers: 13}"
    )
    traced = traced_with(config)
    memory = step_memory(traced, rows=2)
    assert sorted(memory.corners) == [(2, 4), (2, 6), (4, 4), (4, 6)]
    usage = traced.step(9, traced_spec(config.model)).usage
    assert memory.peak(9).total == pytest.approx(max(phase.total for phase in usage.values()), rel=5e-3)
    limit = memory.peak(9).total
    assert memory.largest(limit, most=100) == 9
    assert memory.largest(limit, most=8) == 8
    assert memory.largest(memory.peak(1).total - 1, most=8) == 0


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_one_of_many_ranks(exact_model, strategy):
    config = config_of(exact_model("llama"), f"strategy={strategy}", "devices=64", "precision=bf16-mixed")
    traced = traced_with(config, Topology("cpu", 8, 8))
    trace = traced.step(config.batch_size, traced_spec(config.model))
    model = config.model.build_on_meta(param_dtype=torch.float32)
    sizes = [p.numel() for p in model.parameters()]
    weights, moments = (trace.usage["update"].end[kind] for kind in ("weights", "moments"))
    if strategy == "ddp":
        assert trace.communicated == {"gathered": 0, "reduced": 4 * sum(sizes)}
        assert moments == pytest.approx(8 * sum(sizes), rel=0.01)
        assert trace.usage["update"].end["gradients"] == 4 * sum(sizes), "DDP keeps its buckets"
        return
    # Rank 0 has the first rows of every parameter: ceil(rows / ranks) of them.
    rows = [4 * math.ceil(len(p) / 64) * (p.numel() // len(p)) for p in model.parameters()]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert weights == sum(rows) + buffers
    assert moments == pytest.approx(2 * sum(rows), rel=0.05)  # and a step counter each
    padded = [64 * math.ceil(len(p) / 64) * (p.numel() // len(p)) for p in model.parameters()]
    assert trace.communicated["gathered"] == 2 * 2 * sum(padded), (
        "in 16 bits, for the forward and again for the backward"
    )
    assert trace.communicated["reduced"] == 4 * sum(padded)
    # Nothing as large as an unsharded tensor exists while the shards are updated.
    assert trace.usage["update"].total < 8 * (weights + moments)
    assert trace.usage["update"].peak.get("temporary", 0) < 2 * sum(rows)


def test_moments_of_8_bits_and_averages_of_the_weights(exact_model):
    config = config_of(exact_model("llama-tied"), "optimizer=adamw_8bit", "hook=[ema]")
    end = traced_with(config).step(config.batch_size, traced_spec(config.model)).usage["update"].end
    model = config.model.build_on_meta(param_dtype=torch.float32)
    assert end["hooks"] == 2 * 4 * sum(p.numel() for p in model.parameters())
    named = SimpleNamespace(hf_named_parameters=model.named_parameters)
    assert end["moments"] == moment_bytes(config.optimizer, named)


def test_a_gpu_keeps_other_tensors():
    """Under autocast CUDA computes pow in fp32; of dropout it keeps a mask of one byte."""
    x = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), CudaOperators():
        assert torch.pow(x, 3.0).dtype == (x**3.0).dtype == torch.float32
        assert torch.nn.functional.softmax(x, -1).dtype == torch.float32
        assert torch.nn.functional.linear(x, x).dtype == torch.bfloat16
    tracker = StorageTracker()
    with tracker, CudaOperators():
        dropped = torch.nn.functional.dropout(x, 0.5, training=True)
    assert sum(tracker.usage()["setup"].end.values()) == 2 * 64 * 64 + 64 * 64
    del dropped
    assert not sum(tracker.usage()["setup"].end.values())
    with CudaOperators(), fake_tensors():
        q = torch.empty(2, 4, 128, 16, requires_grad=True)
        with tracker:
            tracker.restart()
            kept = torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5, is_causal=True)
            assert sum(tracker.usage()["setup"].end.values()) < 4 * q.numel() + 4 * 128 * 128, (
                "no matrix of probabilities"
            )
        del kept


HEADS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2},
    "cohere (logit_scale)": SHAPES["llama"] | {"model_type": "cohere", "num_hidden_layers": 1, "pad_token_id": None},
    "gemma2 (capped)": SHAPES["llama"] | {"model_type": "gemma2", "num_hidden_layers": 1, "head_dim": 8},
    "qwen3": SHAPES["llama"] | {"model_type": "qwen3", "num_hidden_layers": 1, "head_dim": 8},
    "opt": SHAPES["opt"] | {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_plain_where_the_probe_says_so(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    from pretrain.models.probe import has_plain_head

    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(**HEADS[name], vocab_size=64))
    hf.config.use_cache = False
    assert has_copied_head(hf.eval()) == has_plain_head(hf) == ("(" not in name)


def test_layers_of_several_kinds_repeat():
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(num_hidden_layers=12)
    assert period_of(config, False) == 6
    assert period_of(config, 4) == 12, "kinds of 6 layers and a checkpoint in every 4th"
    assert with_layers(config, 5).layer_types == config.layer_types[:5]
    assert len(config.layer_types) == 12
