"""A model's files do not choose kernels, further files or plans; ``model.attention`` and the architecture do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny

from pretrain.models.causal_lm import Pretrained, Scratch
from pretrain.models.hub.config_files import without_kernels
from pretrain.models.hub.files import SAMPLE
from pretrain.runtime.errors import UserError

FOREIGN = "nobody/kernel-of-a-stranger"
PLANTED: dict[str, Any] = {
    "_attn_implementation": FOREIGN,
    "attn_implementation": FOREIGN,
    "_attn_implementation_internal": FOREIGN,
    "_attn_implementation_autoset": True,
    "_experts_implementation": FOREIGN,
    "experts_implementation": FOREIGN,
    "use_kernels": True,
    "kernel_config": {"RMSNorm": FOREIGN},
    "fusion_config": {"patch": FOREIGN},
    "transformers_weights": "../elsewhere.safetensors",
    "base_model_tp_plan": {"*": "colwise"},
    "distributed_config": {"tp_size": 2},
    "output_attentions": True,
    "num_labels": 10**12,
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
}


def edit(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def implementations(spec: Pretrained | Scratch) -> set[str]:
    """Of every part of the model, built in both ways."""
    built = spec.build(param_dtype=torch.float32, device=torch.device("cpu"), seed=0).hf
    build_on_meta = spec.build_on_meta(param_dtype=torch.float32).hf
    configs = [m.config for hf in (built, build_on_meta) for m in hf.modules() if hasattr(m, "config")]
    assert {c._experts_implementation for c in configs} <= {"eager", "grouped_mm", None}
    return {c._attn_implementation for c in configs}


@pytest.mark.parametrize("key", PLANTED)
def test_a_key_in_config_json_is_ignored(key: str, tmp_path: Path) -> None:
    folder = edit(Path(shutil.copytree(SAMPLE, tmp_path / "m")), **{key: PLANTED[key]})
    hf = Pretrained(name_or_path=str(folder)).build(param_dtype=torch.float32, device=torch.device("cpu"), seed=0).hf
    assert hf.config._attn_implementation == "sdpa"
    if key != "output_attentions":
        assert key.removeprefix("_") not in hf.config.to_dict()


def test_all_of_them_at_once_however_it_is_built(tmp_path: Path) -> None:
    folder = edit(Path(shutil.copytree(SAMPLE, tmp_path / "m")), **PLANTED)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    spec = Pretrained(name_or_path=str(folder))
    spec.check(64)
    assert implementations(spec) == {"sdpa"}
    assert implementations(Pretrained(name_or_path=str(folder), attention="eager")) == {"eager"}
    scratch = Scratch(name_or_path=str(folder), overrides={"num_hidden_layers": 1})
    assert implementations(scratch) == {"sdpa"}
    assert not (tmp_path / "trace").exists()
    exported = spec.build(param_dtype=torch.float32, device=torch.device("cpu"), seed=0).hf.config.to_dict()
    assert FOREIGN not in json.dumps(exported, default=str)
    assert "evil" not in json.dumps(exported, default=str)


@pytest.mark.parametrize("key", ["_attn_implementation", "_experts_implementation", "use_kernels"])
def test_in_a_sub_config_too(key: str, tmp_path: Path) -> None:
    hf = tiny("emu3", vocabulary_map={"<image>": 1})
    text = hf.config.get_text_config().to_dict() | {"model_type": "emu3_text_model", key: PLANTED[key]}
    cleaned = without_kernels({"model_type": "emu3", "text_config": text, "parts": [{key: PLANTED[key]}]})
    assert key not in cleaned["text_config"]
    assert cleaned["parts"] == [{}]
    assert cleaned["text_config"]["hidden_size"] == text["hidden_size"]
    folder = tmp_path / "m"
    mixture = tiny("mixtral")
    mixture.save_pretrained(folder)
    edit(folder, **{key: PLANTED[key]}, sub={"deep": {key: PLANTED[key]}})
    assert implementations(Pretrained(name_or_path=str(folder))) == {"sdpa"}


def test_kernels_of_convolutions_stay() -> None:
    mine = {"conv_kernel": 4, "linear_conv_kernel_dim": 4, "kernel_size": 3, "head_dim": 8}
    assert without_kernels(mine) == mine


@pytest.mark.parametrize("where", [(), ("text_config",)])
def test_quantized_weights_are_refused(where: tuple[str, ...], tmp_path: Path) -> None:
    quantized: dict[str, Any] = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    for key in where:
        quantized = {key: quantized}
    folder = edit(Path(shutil.copytree(SAMPLE, tmp_path / "m")), **quantized)
    with pytest.raises(UserError, match=r"quantization_config \(mxfp4\): quantized weights can't be trained"):
        Pretrained(name_or_path=str(folder)).check(64)
    edit(folder, quantization_config=None, text_config=None)
    Pretrained(name_or_path=str(folder)).check(64)


def test_the_class_is_the_one_that_transformers_chooses(tmp_path: Path) -> None:
    """It takes a Mistral with types of layers for a Ministral."""
    tiny("ministral").save_pretrained(tmp_path)
    edit(tmp_path, model_type="mistral")
    config = Pretrained(name_or_path=str(tmp_path)).hf_config()
    assert config.model_type == "ministral"
    assert config.name_or_path == str(tmp_path)
