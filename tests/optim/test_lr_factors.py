"""Learning rates that differ between parameters, for optimizers of any class."""

import pytest
import torch
from torch import nn

from pretrain.config.compose import run_config
from pretrain.optim.adamw import AdamW
from pretrain.optim.combined import combined
from pretrain.optim.lr_factors import LrFactors, heights, split_by_factor
from pretrain.runtime.errors import UserError
from tests.engines import BATCH, engine_of

NAMES = [
    "model.embed.weight",
    "model.layers.0.up.weight",
    "model.layers.10.up.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_the_last_pattern_that_matches_counts():
    factors = LrFactors({"layers": 0.5, r"layers\.1": 0.1, "norm|head": 2.0}).of(NAMES)
    assert [factors[name] for name in NAMES] == [1.0, 0.5, 0.1, 2.0, 2.0]


def test_layer_decay_counts_blocks_below_the_head():
    assert heights(NAMES) == dict(zip(NAMES, [0, 1, 11, 12, 12], strict=True))
    factors = LrFactors({"embed": 0.1}, layer_decay=0.9).of(NAMES)
    assert [factors[name] for name in NAMES] == pytest.approx([0.1 * 0.9**12, 0.9**11, 0.9, 1.0, 1.0])
    assert LrFactors(layer_decay=0.5).of(["a.weight", "b.weight"]) == {"a.weight": 1.0, "b.weight": 1.0}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "emed",
            r"optimizer.lr_multipliers='emed' matches nothing; there is model.embed.weight, model.layers.\*.up.weight, ",
        ),
        ("(", r"optimizer.lr_multipliers='\(': not a regular expression"),
    ],
)
def test_a_pattern_that_can_not_be_meant(pattern, message):
    with pytest.raises(UserError, match=message):
        LrFactors({pattern: 0.5}).of(NAMES)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "optimizer.lr_multipliers={embed: 0}",
            r"optimizer.lr_multipliers=\{'embed': 0\}: input should be greater than 0",
        ),
        ("optimizer.layer_decay=1.5", "optimizer.layer_decay=1.5: input should be less than or equal to 1"),
        ("optimizer.lr_multiplier={a: 1}", "AdamW has no 'lr_multiplier'; did you mean 'lr_multipliers'"),
    ],
)
def test_values_that_can_not_be_meant(word, message):
    with pytest.raises(UserError, match=message):
        run_config([word])


def test_optimizers_of_other_packages_have_them_too():
    words = ["optimizer._target_=torch.optim.SGD", "allow_targets=[torch.optim]", "optimizer.lr_multipliers={one: 0.5}"]
    config = run_config(words)
    assert config.lr_factors == LrFactors({"one": 0.5})
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
    made = config.with_lr(0.1).optimizer(model.named_parameters())
    split_by_factor([made], model.named_parameters(), config.lr_factors.of([n for n, _ in model.named_parameters()]))
    assert {id(p): g["lr_factor"] for g in made.param_groups for p in g["params"]} == {
        id(p): 0.5 if name.startswith("one") else 1.0 for name, p in model.named_parameters()
    }


def test_without_factors_the_groups_are_what_they_were():
    model = nn.Linear(2, 2)
    made = AdamW(lr=0.1)(model.named_parameters())
    split_by_factor([made], model.named_parameters(), {"weight": 1.0})
    assert [("lr_factor" in group, len(group["params"])) for group in made.param_groups] == [(False, 1), (False, 1)]


def test_a_step_moves_each_parameter_by_its_rate():
    """SGD's update is linear in the rate, so it shows the factor; the reported rate is the one without a factor."""
    engines = []
    for factors in (LrFactors(), LrFactors({"embed|mlp": 0.25})):
        engine = engine_of()
        named = list(engine.model.hf_named_parameters())
        made = [torch.optim.SGD([p for n, p in named if ("mlp" in n) == mlp], lr=0.5) for mlp in (True, False)]
        split_by_factor(made, named, factors.of([n for n, _ in named]))
        engine = type(engine)(engine.model, combined(made), precision=engine.precision, world=engine.world)
        before = {n: p.detach().clone() for n, p in named}
        assert engine.set_lr(lambda step: 0.5, 0) == 0.25
        engine.train_step(BATCH)
        engines.append({n: p.detach() - before[n] for n, p in named})
    for name, moved in engines[1].items():
        factor = 0.25 if "embed" in name or "mlp" in name else 1.0
        torch.testing.assert_close(moved, engines[0][name] * factor, rtol=1e-3, atol=1e-7)
        assert moved.abs().max() > 1e-5, name
