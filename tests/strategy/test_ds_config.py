"""DeepSpeed's config as the run, ``strategy.config`` and our defaults make it, and as DeepSpeed itself reads it."""

from importlib import import_module
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pretrain.distributed.sharding import TensorFiles
from pretrain.distributed.topology import Topology
from pretrain.models.causal_lm import Scratch
from pretrain.models.language_model import LanguageModel
from pretrain.models.model_factory import ModelFactory
from pretrain.runtime.errors import UserError
from pretrain.strategy.base import StepConfig
from pretrain.strategy.deepspeed import COMPILED, OWNERS, ROOT_KEYS, Deepspeed
from tests.engines import ALONE
from tests.models.tiny import tiny
from tests.optimizers import adagrad, groups, muon_and_adamw, row_wise
from tests.strategy.test_precision import load


def setting(precision: str = "16-mixed", device_type: str = "cuda") -> tuple[StepConfig, Topology]:
    return StepConfig(load(precision), batch_size=4, accumulation=8, grad_clip=0.5), Topology(device_type)


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def test_fp16_on_a_gpu():
    config = Deepspeed(zero_stage=2, offload_optimizer=True).ds_config(*setting())
    assert config["fp16"] == {"enabled": True, "loss_scale_window": 2000, "hysteresis": 1}
    assert config["bf16"] == {"enabled": False}
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert config["zero_optimization"]["offload_param"] == {"device": "none", "pin_memory": True}
    assert (config["train_batch_size"], config["gradient_clipping"]) == (32, 0.5)


def test_on_a_cpu_nothing_is_pinned():
    zero = Deepspeed(zero_stage=3, offload_parameters=True).ds_config(*setting("bf16-mixed", "cpu"))[
        "zero_optimization"
    ]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}


def test_stage_0_leaves_clipping_and_precision_to_the_run():
    config = Deepspeed(zero_stage=0).ds_config(*setting())
    assert (config["gradient_clipping"], config["fp16"]["enabled"], config["bf16"]["enabled"]) == (0.0, False, False)


def test_more_keys_are_merged_and_auto_is_what_the_run_decides():
    more = {
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000, "offload_optimizer": {"ratio": 0.5}},
        "fp16": {"initial_scale_power": 8, "hysteresis": 2},
        "wall_clock_breakdown": True,
    }
    config = Deepspeed(config=more).ds_config(*setting())
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"]) == (2, 1000)
    assert zero["offload_optimizer"] == {"device": "none", "pin_memory": True, "ratio": 0.5}
    assert config["fp16"] == {"enabled": True, "loss_scale_window": 2000, "hysteresis": 2, "initial_scale_power": 8}
    assert config["wall_clock_breakdown"] is True


ELSEWHERE = {  # keys by which a config file would have something written, or read, in places of its own choice
    "tensorboard": {"enabled": True, "output_path": "/tmp/x"},
    "csv_monitor": {"enabled": True, "output_path": "/tmp/x"},
    "wandb": {"enabled": True, "team": "theirs"},
    "comet": {"enabled": True},
    "flops_profiler.output_file": "/tmp/x",
    "autotuning": {"enabled": True, "results_dir": "/tmp/x"},
    "data_efficiency": {"enabled": True},
}


def test_the_flops_profiler_may_print():
    config = Deepspeed(config={"flops_profiler": {"enabled": True}}).ds_config(*setting())
    assert config["flops_profiler"] == {"enabled": True}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"zero_optimisation": {}}, "config.zero_optimisation: DeepSpeed has no such key; did you mean 'zero_optimiz"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3: the run sets it to 2 (strategy.zero_stage)"),
        ({"scheduler": {"type": "WarmupLR"}}, "config.scheduler: use the scheduler group instead"),
        *((nested(key, value), f"config.{key}: use {OWNERS[key]} instead") for key, value in ELSEWHERE.items()),
        *(
            (nested(key, True), f"config.{key}: not supported, because DeepSpeed compiles code for it")
            for key in sorted(COMPILED)
        ),
    ],
    ids=str,
)
def test_what_can_not_be_said_there(given, says):
    with pytest.raises(UserError) as raised:
        Deepspeed(config=given).ds_config(*setting())
    assert says in str(raised.value)


class Asked(dict):
    """A config that notes which keys it is asked for."""

    def __init__(self, *given):
        super().__init__(*given)
        self.names = set()

    def __contains__(self, key):
        self.names.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        return super().get(key, default) if key in self else default

    def keys(self):
        return self


def test_the_root_keys_are_those_that_deepspeed_asks_for():
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS as REMOVED

    from pretrain.strategy.deepspeed_engine import check_config

    config = Asked(Deepspeed().ds_config(*setting()))
    del config["bf16"]  # it has an older name
    check_config(config)
    assert config.names - REMOVED.keys() == ROOT_KEYS


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"zero_optimization": {"reduce_bucket_sise": 5}}, "reduce_bucket_sise: Extra inputs are not permitted"),
        ({"checkpoint": {"tag_validation": "maybe"}}, "DeepSpeed rejects it: "),
        ({"data_types": {"keep_in_fp32_modules": 5}}, "DeepSpeed rejects it: data_types.keep_in_fp32_modules must be"),
    ],
    ids=str,
)
def test_what_deepspeed_refuses_is_the_user_s_mistake(given, says):
    from pretrain.strategy.deepspeed_engine import check_config

    with pytest.raises(UserError) as raised:
        check_config(Deepspeed(config=given).ds_config(*setting()))
    assert says in str(raised.value)


def test_a_deepspeed_that_builds_elsewhere_is_not_let_to(monkeypatch):
    from pretrain.strategy.deepspeed_engine import join_process_group

    monkeypatch.delattr(import_module("deepspeed.comm.torch"), "build_shm_op")
    with pytest.raises(AssertionError, match="builds its CPU communication elsewhere"):
        join_process_group({})


@pytest.mark.parametrize(
    ("make", "name"),
    [(row_wise, "RowWise"), (muon_and_adamw, "CombinedOptimizer"), (adagrad, "Adagrad")],
    ids=["of others", "several", "created again"],
)
def test_an_optimizer_that_cannot_update_flat_shards_is_refused(make, name):
    from pretrain.strategy.deepspeed_optimizer import supported

    named = list(tiny("llama").named_parameters())
    with pytest.raises(UserError) as refused:
        supported(make(named), 2)
    assert str(refused.value).startswith(
        f"optimizer: DeepSpeed's stage 2 flattens the parameters, which {name} can't update; use strategy.zero_stage=0, "
        "strategy=fsdp, or one of Adam, AdamW, "
    )
    adamw = groups(named)
    assert supported(adamw, 3) is adamw


def test_moments_of_gathered_and_of_partitioned_parameters(tmp_path):
    """Under stage 3 a parameter is empty between the steps; ``ds_shape`` is what it has when it is gathered."""
    from pretrain.strategy.deepspeed_optimizer import check_moments

    model = LanguageModel(tiny("llama"))
    norm = dict(model.hf_named_parameters())["model.norm.weight"]

    def saved(**named):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        save_file({f"model.norm.weight/{key}": tensor for key, tensor in named.items()}, path)
        return {"optimizer": TensorFiles([path]), "tensors": {}}

    good = saved(exp_avg=torch.zeros(32), step=torch.tensor(2.0))
    check_moments(good, model)
    norm.data = torch.empty(0)
    norm.ds_shape = torch.Size([32])
    check_moments(good, model)
    for bad, says in (
        (saved(exp_avg=torch.zeros(16)), r"model.norm.weight/exp_avg is \(16,\), the model's \(32,\)$"),
        (saved(row=torch.zeros(32, 1)), r"model.norm.weight/row is \(32, 1\), the model's \(32,\)$"),
        (
            good | {"optimizer_values": {"state": {"model.norm.weight/count": 1}}},
            "keep tensors of the parameters' shapes",
        ),
        (
            good | {"optimizer_values": {"state": {"other.weight/count": 1}}},
            "the model has no such trainable parameter",
        ),
    ):
        with pytest.raises(UserError, match=says):
            check_moments(bad, model)


def test_selective_checkpointing_needs_weights_that_stay():
    """Stage 3 gathers them between the operations that torch's selective policy counts."""
    spec = Scratch(name_or_path="x", gradient_checkpointing="selective")
    with pytest.raises(UserError, match=r"^strategy\.zero_stage=3 with model\.gradient_checkpointing=selective: "):
        Deepspeed(zero_stage=3).setup(ModelFactory(spec, torch.float32, 0), None, StepConfig(), ALONE)


def test_stage_3_is_not_compiled(capsys):
    """Its hooks end the graph at every layer."""
    factory = ModelFactory(Scratch(name_or_path="x", compile=True), torch.float32, 0)
    assert Deepspeed(zero_stage=2).compilable(factory) is factory
    assert capsys.readouterr().err == ""
    assert Deepspeed(zero_stage=3).compilable(factory).spec == Scratch(name_or_path="x")
    assert "model.compile=true: not with strategy.zero_stage=3" in capsys.readouterr().err
