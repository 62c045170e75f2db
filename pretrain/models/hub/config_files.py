"""config.json and generation_config.json of a model's folder as transformers' objects. Keys that would let a file choose which
kernels run, where they come from, or which further files are read are removed; ``model.attention`` chooses the kernels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pretrain.models.hub.files import read_object, text_part
from pretrain.runtime.errors import UserError, one_line

# transformers (5.23) reads these keys from a config and its sub-configs. An implementation of the form "owner/name" is a
# kernel that transformers downloads from the Hub and runs.
NOT_FOR_FILES = re.compile(
    r".*_implementation(_internal|_autoset)?|_?use_(hub_)?kernels|kernel_config|fusion_config|distributed_config"
    r"|base_model_\w+_plan|transformers_weights|extra_files|output_attentions|_?use_flash_attention_2"
    r"|_flash_attn_2_enabled|custom_generate|compile_config|cache_implementation"
    r"|num_labels|id2label|label2id"  # tables of any size that a language model does not use
)


def without_kernels(config: Any) -> Any:
    """Return ``config`` (parsed JSON) without the keys of `NOT_FOR_FILES`, at any depth."""
    if isinstance(config, dict):
        return {key: without_kernels(value) for key, value in config.items() if not NOT_FOR_FILES.fullmatch(key)}
    return [without_kernels(value) for value in config] if isinstance(config, list) else config


def check_sizes(config: dict[str, Any], name: str) -> None:
    """Raise ``UserError`` when a number of layers, heads, … is below 1, which transformers accepts."""
    for key in ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head", "vocab_size"):
        value = text_part(config).get(key)
        if isinstance(value, int) and value < 1:
            raise UserError(f"model_name={name}: config.json: {key}={value}; at least 1 is needed")


def check_unquantized(config: dict[str, Any], name: str) -> None:
    """Raise ``UserError`` for quantized weights. They can't be trained, and reading them needs code that the folder names."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config")
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise UserError(
                f"model_name={name}: config.json: quantization_config ({str(method)[:40]}): quantized weights can't be "
                "trained; use the model in bfloat16 or float32 (from_pretrained with dequantization, then save_pretrained)"
            )


def config_object(config: dict[str, Any], folder: Path) -> Any:
    """Return the transformers config object of ``config``, the content of ``folder``/config.json. The folder's own code is not
    run. Errors of transformers' validation are not converted.
    """
    from transformers import AutoConfig

    known = {key: value for key, value in without_kernels(config).items() if key != "auto_map"}
    with TemporaryDirectory() as clean:  # transformers chooses the class from a file, not from a dict
        Path(clean, "config.json").write_text(json.dumps(known))
        found = AutoConfig.from_pretrained(clean, trust_remote_code=False)
    found.name_or_path = str(folder)
    return found


def generation_config(folder: Path, name: str) -> Any:
    """Return the transformers object of generation_config.json; ``None`` without that file. Raises ``UserError`` when the file is
    invalid."""
    from transformers import GenerationConfig

    content = read_generation_config(folder, name)
    if content is None:
        return None
    try:
        return GenerationConfig.from_dict(without_kernels(content))
    except Exception as error:  # its validation raises errors of any type
        raise UserError(f"model_name={name}: {folder / 'generation_config.json'}: {one_line(error, lines=2)}") from None


def read_generation_config(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the content of generation_config.json. Raises ``UserError`` when it is not a JSON object."""
    file = folder / "generation_config.json"
    return read_object(file, label=f"model_name={name}: {file}")


def is_known(model_type: str) -> bool:
    """Return whether transformers has a causal LM of this type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
