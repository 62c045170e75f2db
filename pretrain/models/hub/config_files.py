"""config.json and generation_config.json of a model's folder as transformers' objects, without what a file may not decide:
which kernels run, where they come from, and which further files are read. That is for ``model.attention`` to say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pretrain.models.hub.files import read_object, text_part
from pretrain.runtime.errors import UserError, one_line

# transformers reads these (5.20 to 5.23) from a config, of a sub-config too. "owner/name" in an implementation is a kernel
# that it downloads from the Hub and runs.
NOT_FOR_FILES = re.compile(
    r".*_implementation(_internal|_autoset)?|_?use_(hub_)?kernels|kernel_config|fusion_config|distributed_config"
    r"|base_model_\w+_plan|transformers_weights|extra_files|output_attentions|_?use_flash_attention_2"
    r"|_flash_attn_2_enabled|custom_generate|compile_config|cache_implementation"
    r"|num_labels|id2label|label2id"  # tables of any size, of what no language model has
)


def without_kernels(config: Any) -> Any:
    """``config`` (of JSON) without those keys, at any depth."""
    if isinstance(config, dict):
        return {key: without_kernels(value) for key, value in config.items() if not NOT_FOR_FILES.fullmatch(key)}
    return [without_kernels(value) for value in config] if isinstance(config, list) else config


def check_sizes(config: dict[str, Any], name: str) -> None:
    """Raises ``UserError`` for a number of layers, heads, … below 1, which transformers takes for a model without them."""
    for key in ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head", "vocab_size"):
        value = text_part(config).get(key)
        if isinstance(value, int) and value < 1:
            raise UserError(f"model_name={name}: config.json: {key}={value}; at least 1 is needed")


def check_unquantized(config: dict[str, Any], name: str) -> None:
    """Raises ``UserError`` for weights that are quantized: they can't be trained, and to read them takes code that the
    folder would name."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config")
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise UserError(
                f"model_name={name}: config.json: quantization_config ({str(method)[:40]}): quantized weights can't be trained "
                "on; use the model in bfloat16 or float32 (from_pretrained with dequantization, then save_pretrained)"
            )


def config_object(config: dict[str, Any], folder: Path) -> Any:
    """The transformers config of ``config``, the content of ``folder``/config.json. Code that the folder brings is not run.

    Raises whatever transformers' validation raises.
    """
    from transformers import AutoConfig

    known = {key: value for key, value in without_kernels(config).items() if key != "auto_map"}
    with TemporaryDirectory() as clean:  # transformers chooses the class by the file, not by a dict
        Path(clean, "config.json").write_text(json.dumps(known))
        found = AutoConfig.from_pretrained(clean, trust_remote_code=False)
    found.name_or_path = str(folder)
    return found


def generation_config(folder: Path, name: str) -> Any:
    """The transformers object of generation_config.json; ``None`` without that file. Raises ``UserError`` when it is broken."""
    from transformers import GenerationConfig

    content = read_generation_config(folder, name)
    if content is None:
        return None
    try:
        return GenerationConfig.from_dict(without_kernels(content))
    except Exception as error:  # whatever its validation raises
        raise UserError(f"model_name={name}: {folder / 'generation_config.json'}: {one_line(error, lines=2)}") from None


def read_generation_config(folder: Path, name: str) -> dict[str, Any] | None:
    """The content of generation_config.json. Raises ``UserError`` when it is no JSON object."""
    file = folder / "generation_config.json"
    return read_object(file, said=f"model_name={name}: {file}")
