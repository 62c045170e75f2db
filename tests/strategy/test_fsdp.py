"""What FSDP's options do: which modules are gathered by themselves, how their weights lie, when they are let go."""

from collections import Counter

import pytest
import torch
import torch.distributed.fsdp as fsdp
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

from pretrain.distributed.sharding import local
from pretrain.runtime.errors import UserError
from pretrain.strategy.fsdp import Fsdp, mixed_precision
from tests.strategy.ranks import as_rank, set_up
from tests.strategy.test_ds_config import setting
from tests.strategy.test_precision import load


@pytest.mark.parametrize(
    ("shape", "policy", "modules"),
    [
        ("llama-tied", "auto", {"FSDPLlamaDecoderLayer": 3}),
        ("llama", "llama", {"FSDPLlamaDecoderLayer": 3}),
        ("llama", "LlamaMLP", {"FSDPLlamaMLP": 3}),
        ("gpt2", "auto", {"FSDPGPT2Block": 3}),
        ("gpt2", "gpt2", {"FSDPGPT2Block": 3}),
        ("opt", "auto", {"FSDPOPTDecoderLayer": 2}),
    ],
)
def test_the_policy_names_the_modules(shape, policy, modules, factory):
    with as_rank(0, 2) as world:
        model = set_up(Fsdp(auto_wrap_policy=policy), factory(shape), world).model
        assert isinstance(model, FSDPModule)
        parts = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
        assert Counter(type(m).__name__ for m in parts) == modules


@pytest.mark.parametrize(
    ("strategy", "mesh", "share", "let_go"),
    [
        (Fsdp(sharding_strategy="FULL_SHARD"), (4,), 4, True),
        (Fsdp(sharding_strategy="SHARD_GRAD_OP"), (4,), 4, False),
        (Fsdp(sharding_strategy="HYBRID_SHARD"), (2, 2), 2, True),
        (Fsdp(sharding_strategy="HYBRID_SHARD", replicas=1), (1, 4), 4, True),
        (Fsdp(sharding_strategy="NO_SHARD"), (4, 1), 1, False),
    ],
    ids=lambda value: f"{value.sharding_strategy} {value.replicas}" if isinstance(value, Fsdp) else "",
)
def test_how_weights_lie_and_when_they_are_let_go(strategy, mesh, share, let_go, factory, batch):
    """Of a block, after its forward."""
    with as_rank(0, 4) as world:
        engine = set_up(strategy, factory("llama-tied"), world)
        for parameter in engine.model.parameters():
            assert tuple(parameter.device_mesh.shape) == mesh
            assert len(local(parameter)) * share == len(parameter)
        engine.step_module(batch.input_ids, batch.labels, None)
        block = engine.model.hf.model.layers[0]
        assert {isinstance(p, DTensor) for p in block.parameters()} == {let_go}


@pytest.mark.parametrize("offload", [False, True])
def test_precision_and_offload_reach_every_module(offload, factory, monkeypatch):
    given, real = [], fsdp.fully_shard
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **options: given.append(options) or real(module, **options))
    with as_rank(0, 2) as world:
        set_up(Fsdp(cpu_offload=offload), factory("llama"), world, "bf16-mixed")
    assert len(given) == 4
    for options in given:
        assert options["mp_policy"] == MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        assert options["offload_policy"] == (CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy())


@pytest.mark.parametrize(
    ("precision", "gathered"), [("32-true", None), ("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)]
)
def test_weights_are_gathered_in_the_type_of_the_products(precision, gathered):
    policy = mixed_precision(load(precision))
    assert policy.param_dtype == gathered
    assert policy.reduce_dtype == (gathered and torch.float32)


def test_a_loss_scaler_and_gradients_on_the_host_are_refused_on_a_gpu():
    """The scale would be read there before it has arrived: gradients came out as 0 on an H200."""
    with pytest.raises(
        UserError, match=r"cpu_offload=true with precision=16-mixed: .*use bf16-mixed, or strategy=deeps"
    ):
        Fsdp(cpu_offload=True).check(*setting("16-mixed"))
    Fsdp(cpu_offload=True).check(*setting("bf16-mixed"))
    assert "strategy.cpu_offload=true" not in Fsdp().memory_saving_overrides(*setting("16-mixed"))
    assert "strategy.cpu_offload=true" in Fsdp().memory_saving_overrides(*setting("bf16-mixed"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_exchanged_in_the_type_that_is_asked_for(precision):
    gathered = mixed_precision(load(precision)).param_dtype
    assert mixed_precision(load(precision), "bfloat16") == MixedPrecisionPolicy(gathered, torch.bfloat16)


def test_blocks_are_gathered_ahead(factory, monkeypatch):
    """In the order in which they run; nothing is set where torch chooses."""
    asked = {"forward": {}, "backward": {}}
    for way, found in asked.items():
        name = f"set_modules_to_{way}_prefetch"
        monkeypatch.setattr(FSDPModule, name, lambda self, modules, found=found: found.update({self: modules}))
    with as_rank(0, 2) as world:
        set_up(Fsdp(), factory("llama"), world)
        assert asked == {"forward": {}, "backward": {}}
        one, two, three = set_up(Fsdp(prefetch=2), factory("llama"), world).model.hf.model.layers
    assert asked["forward"] == {one: [two, three], two: [three], three: []}
    assert asked["backward"] == {one: [], two: [one], three: [two, one]}


@pytest.mark.parametrize("reshard", [True, False])
def test_embeddings_and_head_may_stay_gathered(reshard, factory, batch):
    with as_rank(0, 2) as world:
        engine = set_up(Fsdp(reshard_root=reshard), factory("llama"), world)
        engine.step_module(batch.input_ids, batch.labels, None)
        model = engine.model.hf
        assert isinstance(model.lm_head.weight, DTensor) is reshard
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
