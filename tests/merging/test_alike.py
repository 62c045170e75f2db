"""Only models that compute the same from equal weights are merged: tensors, configs and tied heads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from pretrain.merging.config import MergeConfig
from pretrain.merging.inputs import _computation
from pretrain.merging.merge import open_merge
from pretrain.runtime.errors import UserError
from tests.merging.test_merge import SPEC, model, weights_of


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> list[Path]:
    return [model(tmp_path_factory.mktemp(f"m{seed}"), tokenizer, seed=seed) for seed in range(2)]


def test_models_that_differ(models, tmp_path, tokenizer) -> None:
    """Nothing of a model is left out silently, whichever is the first."""
    tied = model(tmp_path / "tied", tokenizer, seed=7, tie_word_embeddings=True)
    deep = model(tmp_path / "deep", tokenizer, seed=7, num_hidden_layers=4)
    for one, other, name in ((models[0], deep, r"model\.layers\.[23]\..*"), (models[0], tied, r"lm_head\.weight")):
        for pair in ((one, other), (other, one)):
            with pytest.raises(UserError, match=rf"merge\.models: these models can't be merged: {name} is missing in "):
                open_merge(MergeConfig(models=[str(path) for path in pair]), SPEC)


def test_models_of_one_family_are_alike() -> None:
    """As Qwen2.5-0.5B and its Instruct model, whose configs differ in what has no effect; in the spelling of an earlier version,
    too."""
    from transformers import AutoConfig

    def of(**given) -> object:
        return _computation(AutoConfig.for_model("qwen2", num_hidden_layers=24, **given).to_dict())

    base = of(
        max_window_layers=24, use_mrope=False, max_position_embeddings=131072, rope_theta=1e6, sliding_window=131072
    )
    tuned = {"max_window_layers": 21, "max_position_embeddings": 32768, "eos_token_id": 5, "sliding_window": 32768}
    assert of(**tuned, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}) == base
    assert of(**tuned, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}) != base
    assert of(**tuned, rope_theta=1e6, use_sliding_window=True) != base
    scaled = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 2.0}
    assert of(rope_parameters=scaled, max_position_embeddings=64) != of(
        rope_parameters=scaled, max_position_embeddings=128
    )


def changed_config(folder: Path, to: Path, **changes) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | changes))
    return to


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rms_norm_eps": 0.5}, "rms_norm_eps is 1e-06 in .* and 0.5 in "),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters is "),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "head_dim is "),
        (
            {"bos_token_id": 5, "dtype": "bfloat16", "use_cache": False, "_name_or_path": "x", "architectures": ["x"]},
            None,
        ),
    ],
    ids=["eps", "rope", "heads", "alike"],
)
def test_configs_that_differ(models, tmp_path, changes, says) -> None:
    other = changed_config(models[1], tmp_path / "other", **changes)
    config = MergeConfig(models=[str(models[0]), str(other)])
    if says is None:
        open_merge(config, SPEC)
        return
    with pytest.raises(
        UserError, match=rf"merge\.models: these models can't be merged: their config\.json differ, {says}"
    ):
        open_merge(config, SPEC)
    if "rms_norm_eps" in changes:
        open_merge(config, replace(SPEC, overrides=changes))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_a_tied_one(models, tmp_path, tokenizer, equal) -> None:
    tied = model(tmp_path / "tied", tokenizer, seed=7, tie_word_embeddings=True)
    weights = weights_of(tied)
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0 if equal else 1
    untied = changed_config(tied, tmp_path / "untied", tie_word_embeddings=False)
    twice = changed_config(tied, tmp_path / "twice")
    for folder in (untied, twice):
        save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    for pair, says in (
        ([tied, untied], "lm_head.weight is missing in .*tied"),
        ([tied, twice], r"merge\.models=.*twice: .*lm_head\.weight in the weight files is not the embedding"),
        ([twice, tied], r"merge\.models=.*twice: .*lm_head\.weight in the weight files is not the embedding"),
    ):
        config = MergeConfig(models=[str(path) for path in pair])
        if equal:
            assert "lm_head.weight" not in open_merge(config, SPEC).names
        else:
            with pytest.raises(UserError, match=says):
                open_merge(config, SPEC)
