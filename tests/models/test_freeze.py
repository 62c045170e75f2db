"""``transform=[freeze]``: what is trained, and from when on."""

import pytest
import torch

from pretrain.config.compose import run_config
from pretrain.models.transforms.apply import apply_transforms
from pretrain.models.transforms.freeze import Freeze
from pretrain.runtime.errors import UserError
from tests.models.tiny import tiny


def trained_of(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        (Freeze(frozen=r"embed|layers\.0\."), lambda name: "embed" not in name and "layers.0." not in name),
        (Freeze(trainable="norm"), lambda name: "norm" in name),
        (Freeze(trainable="norm", thaw_at=0.5), lambda name: True),
    ],
    ids=["frozen", "trainable", "thawed"],
)
def test_what_is_trained(freeze, trained):
    model = tiny("llama")
    transformed = apply_transforms([freeze], model, seed=0)
    names = {name for name, _ in model.named_parameters()}
    assert trained_of(model) == {name for name in names if trained(name)}
    assert transformed.thaw_at == ({name: 0.5 for name in names if "norm" not in name} if freeze.thaw_at else {})


def test_a_tied_weight_has_both_names():
    model = tiny("llama-tied-biased")
    apply_transforms([Freeze(frozen="lm_head")], model, seed=0)
    assert not model.model.embed_tokens.weight.requires_grad
    apply_transforms([Freeze(trainable="lm_head")], model, seed=0)
    assert trained_of(model) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_what_another_transform_has_frozen_can_be_trained_again():
    model = tiny("gpt2")
    apply_transforms([Freeze(frozen="wte"), Freeze(frozen="wpe")], model, seed=0)
    assert not any("wte" in name or "wpe" in name for name in trained_of(model))
    apply_transforms([Freeze(trainable="wpe")], model, seed=0)
    assert trained_of(model) == {"transformer.wpe.weight"}


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            Freeze(frozen="wte"),
            r"freeze.frozen='wte' matches nothing; there is model.embed_tokens.weight, model.layers.\*.self",
        ),
        (Freeze(trainable="wte"), "transform.freeze.trainable='wte' matches nothing"),
        (Freeze(frozen=".", thaw_at=0.5), "transform.freeze.frozen='.' leaves nothing to train; there is model"),
    ],
)
def test_a_pattern_that_can_not_be_meant(freeze, message):
    with pytest.raises(UserError, match=message):
        apply_transforms([freeze], tiny("llama"), seed=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "transform.freeze: set one of frozen and trainable"),
        (["frozen=a", "trainable=b"], "transform.freeze: set one of frozen and trainable"),
        (["frozen='('"], r"transform.freeze.frozen='\(': not a regular expression"),
        (["frozen=a", "thaw_at=1"], "transform.freeze.thaw_at=1"),
        (["frozn=a"], "transform.freeze: Freeze has no 'frozn'; did you mean 'frozen'"),
    ],
)
def test_mistakes_before_torch_is_needed(words, message):
    with pytest.raises(UserError, match=message):
        run_config(["transform=[freeze]", *(f"transform.freeze.{word}" for word in words)])


def test_integers_stay_as_they_are():
    """A parameter that has no gradient is nothing to train."""
    model = tiny("gpt2")
    model.counts = torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    apply_transforms([Freeze(trainable="counts|wpe")], model, seed=0)
    assert trained_of(model) == {"transformer.wpe.weight"}
