"""``model.overrides`` of a pretrained model: other values of the config for the same weights."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain.models.causal_lm import Pretrained
from pretrain.models.overrides import overridden, positions
from pretrain.runtime.errors import UserError

CPU = torch.device("cpu")
OLD = {"model_type": "llama", "max_position_embeddings": 64, "rope_theta": 500.0, "rope_scaling": None}
NEW = {
    "model_type": "llama",
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


@pytest.mark.parametrize("config", [OLD, NEW], ids=["old keys", "new keys"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scaling_multiplies_the_positions(config, key, kind):
    changed = overridden(config, {key: {"rope_type": kind, "factor": 4.0}})
    rope = changed["rope_parameters"]
    assert "rope_scaling" not in changed
    assert (rope["rope_type"], rope["factor"]) == (kind, 4.0)
    assert changed.get("rope_theta", rope.get("rope_theta")) == 500.0
    assert positions(changed)["max_position_embeddings"] == 256
    assert changed["max_position_embeddings"] == (64 if kind == "dynamic" else 256)
    again = overridden(changed, {key: {"rope_type": kind, "factor": 4.0}})
    assert (again == changed) == (kind != "linear")


def test_other_values_are_merged():
    config = {"model_type": "x", "a": 1, "text_config": {"b": 2, "c": 3}}
    assert overridden(config, {"a": 5, "text_config": {"b": 4}}) == config | {"a": 5, "text_config": {"b": 4, "c": 3}}
    assert overridden(config, {}) is config
    assert (
        overridden(OLD, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 100})[
            "max_position_embeddings"
        ]
        == 100
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "yam", "factor": 2.0}},
            "='yam': one of linear, dynamic, yarn.*did you mean .*'yarn'",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor=None: a number of at least 1 is needed"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling.factor=0.5: a number"),
        ({"model_type": "gpt2"}, "model.overrides.model_type: the weights are those of another model"),
        (
            {"hidden_size": 64},
            r"\(hidden_size\) changes the shapes .*embed_tokens.weight: \[300, 32\] → \[300, 64\], and",
        ),
        ({"vocab_size": 320}, r"\[300, 32\] → \[320, 32\].*transform=\[vocabulary\]"),
        ({"num_hidden_layers": 4}, r"layers.3.* none → .*; more blocks: transform=\[expand\]"),
        ({"tie_word_embeddings": True}, r"lm_head.weight: \[300, 32\] → none"),
        ({"ropescaling": {}}, "llama has no 'ropescaling'; did you mean 'rope_scaling'"),
    ],
)
def test_what_can_not_be_meant(exact_model, overrides, message):
    with pytest.raises(UserError, match=message):
        Pretrained(name_or_path=str(exact_model("llama")), overrides=overrides).check(16)


def test_learned_positions_can_not_be_scaled(exact_model):
    model = Pretrained(
        name_or_path=str(exact_model("gpt2")), overrides={"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    )
    with pytest.raises(UserError, match="gpt2 has no 'rope_scaling'"):
        model.check(16)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_the_model_computes_what_transformers_computes(exact_model, tmp_path, kind):
    folder = exact_model("llama")
    limit = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(
        UserError,
        match=r"or extend them: 'model.overrides=\{rope_scaling: \{rope_type: yarn, factor: 2.0",
    ):
        Pretrained(name_or_path=str(folder)).check(2 * limit)
    spec = Pretrained(name_or_path=str(folder), overrides={"rope_scaling": {"rope_type": kind, "factor": 2.0}})
    spec.check(2 * limit)
    with pytest.raises(UserError, match=f"sequence_length={2 * limit + 1}"):
        spec.check(2 * limit + 1)
    assert spec.identity() != Pretrained(name_or_path=str(folder)).identity()
    ids = torch.randint(300, (1, 2 * limit), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        built = spec.build(param_dtype=torch.float32, device=CPU, seed=0).eval()
        plain = Pretrained(name_or_path=str(folder)).build(param_dtype=torch.float32, device=CPU, seed=0).eval()
        built.hf.save_pretrained(tmp_path)
        read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert read.config.rope_parameters["rope_type"] == kind
        ours, theirs = built.hf(ids).logits, read(ids).logits
        assert torch.equal(ours, theirs)
        assert (ours - plain.hf(ids).logits).abs().max() > 1e-6
