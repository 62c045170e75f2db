from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pretrain.config.check import conf_dir
from pretrain.optim.adamw import AdamW
from pretrain.runtime.errors import UserError
from pretrain.strategy.precision import Precision


def load(name: str) -> Precision:
    node = yaml.safe_load((conf_dir() / "precision" / f"{name}.yaml").read_text())
    assert node.pop("_target_") == "pretrain.strategy.precision.Precision"
    return Precision(**node)


NAMES = sorted(Path(f).stem for f in (conf_dir() / "precision").glob("*.yaml"))


def test_the_four_names() -> None:
    assert NAMES == ["16-mixed", "32-true", "bf16-mixed", "bf16-true"]
    assert [load(name).name for name in NAMES] == NAMES


@pytest.mark.parametrize(
    ("name", "weights", "products"),
    [
        ("32-true", torch.float32, torch.float32),
        ("16-mixed", torch.float32, torch.float16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_types(name: str, weights: torch.dtype, products: torch.dtype) -> None:
    precision = load(name)
    layer = nn.Linear(4, 4).to(precision.param_dtype)
    x = torch.ones(1, 4, dtype=precision.param_dtype)
    with precision.autocast("cpu"):
        assert layer(x).dtype == products
    assert layer.weight.dtype == weights
    assert precision.grad_scaler("cpu").is_enabled() == (name == "16-mixed")


def test_fp16_is_refused_on_a_cpu_only() -> None:
    with pytest.raises(UserError, match=r"16-mixed needs a GPU.*bf16-mixed or 32-true.*allow_cpu=true"):
        load("16-mixed").check("cpu")
    load("16-mixed").check("cuda")
    Precision("16-mixed", "float32", "float16", allow_cpu=True).check("cpu")
    for name in set(NAMES) - {"16-mixed"}:
        load(name).check("cpu")


def engine(name: str, **changes: Any) -> Any:
    from pretrain.distributed.context import DistributedContext
    from pretrain.models.causal_lm import Scratch
    from pretrain.strategy.engine import Engine

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    overrides = shape | {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64}
    precision, world = load(name), DistributedContext()
    spec = Scratch(name_or_path="none", overrides=overrides, train_tokenizer=300)
    model = spec.build(param_dtype=precision.param_dtype, device=world.device, seed=0)
    return Engine(model, AdamW(lr=1e-2)(model.hf_named_parameters()), precision=precision, world=world)


def steps(run: Any, count: int) -> list[float]:
    from pretrain.data.batch import Batch

    ids = torch.arange(33).repeat(2, 1)
    batch = Batch(ids[:, :-1], ids[:, 1:], None, 64)
    losses = []
    for _ in range(count):
        losses.append(float(run.backward(batch, tokens=64, last=True)))
        run.step(1.0)
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_every_precision_learns_as_fp32_does(name: str) -> None:
    run = engine(name)
    losses, exact = steps(run, 12), steps(engine("32-true"), 12)
    assert losses[0] == pytest.approx(exact[0], rel=5e-3)
    lost = int(run.skipped)  # fp16 feels its way to a scale
    assert lost <= 2
    assert losses[-1] == pytest.approx(exact[-1 - lost], rel=0.02)
    assert losses[-1] < 0.7 * losses[0]


def test_fp16_overflow_skips_the_step_and_counts_it() -> None:
    run = engine("16-mixed")
    steps(run, 2)
    before = {n: p.detach().clone() for n, p in run.model.hf_named_parameters()}
    scale = run.scaler.get_scale()
    run.scaler.update(1e38)  # no gradient survives this
    steps(run, 1)
    assert int(run.skipped) == 1
    assert all(torch.equal(before[n], p) for n, p in run.model.hf_named_parameters())
    run.scaler.update(scale)
    steps(run, 1)
    assert int(run.skipped) == 1
    assert any(not torch.equal(before[n], p) for n, p in run.model.hf_named_parameters())
