"""Where a run's model comes from: a pretrained folder or Hub id, or a config with random weights.

Specs are values from YAML; torch and transformers are imported when the model is built. Remote code stays off unless asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash
from pydantic import PositiveInt

from pretrain.errors import UserError
from pretrain.models.files import check_positions, check_weights, model_folder, read_config

if TYPE_CHECKING:
    import torch

    from pretrain.models.language_model import LanguageModel

Texts = Callable[[], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """What both kinds share. ``tokenizer``: a folder or Hub id, if not the model's own. ``revision``: of a Hub id."""

    name_or_path: str
    revision: str | None = None
    tokenizer_name: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    trust_remote_code: bool = False

    def folder(self) -> Path:
        return model_folder(self.name_or_path, revision=self.revision)

    def config(self) -> dict[str, Any]:
        """config.json as a dict. Raises ``UserError`` when there is none, or when it needs remote code that is off."""
        config = read_config(self.folder(), self.name_or_path)
        if "auto_map" in config and not self.trust_remote_code and not _is_known(config["model_type"]):
            raise UserError(
                f"model_name={self.name_or_path}: its model_type {config['model_type']!r} brings code of its own, which would "
                "run on this machine; if you trust its author: model.trust_remote_code=true"
            )
        return config

    def identity(self) -> str:
        """Changes when the architecture or where the weights come from does."""
        return f"{self.name_or_path}@{self.revision} {xxhash.xxh3_64_hexdigest(repr(sorted(self.config().items())).encode())}"

    def tokenizer(self, texts: Texts | None) -> Any:
        """The tokenizer (a transformers one). ``texts``: the training documents, for a spec that trains its own.

        Raises ``UserError`` when there is none or it has tokens that the model has no embedding for.
        """
        from transformers import AutoTokenizer

        name = self.tokenizer_name or self.name_or_path
        folder = model_folder(
            name, revision=self.revision, key="model.tokenizer_name" if self.tokenizer_name else "model_name"
        )
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=self.trust_remote_code)
        except Exception as error:  # transformers raises whatever the broken file made it raise
            raise UserError(f"model_name={name}: no usable tokenizer in {folder}: {_first_line(error)}") from None
        config = self.config()
        rows = config.get("text_config", config).get("vocab_size")
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if rows is not None and largest >= rows:
            raise UserError(
                f"model_name={name}: the tokenizer has token ids up to {largest}, the model an embedding of {rows} rows; "
                "they do not belong together"
            )
        return tokenizer

    def _finish(self, hf: Any, device: torch.device) -> LanguageModel:
        from pretrain.models.language_model import LanguageModel

        if self.gradient_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        model = LanguageModel(hf.to(device), compile=self.compile)
        model.train()
        return model

    def save(self, model: LanguageModel, tokenizer: Any, folder: Path) -> None:
        """Fill ``folder`` with config, safetensors, generation config and tokenizer, for ``from_pretrained``."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model.hf.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


@dataclass(frozen=True, kw_only=True)
class Pretrained(CausalLM):
    """Continue from existing weights."""

    def check(self, sequence_length: int) -> None:
        """Raises ``UserError`` for a folder that is no whole model or a sequence it has no positions for. No torch."""
        folder, config = self.folder(), self.config()
        check_positions(config, sequence_length, self.name_or_path)
        check_weights(folder, self.name_or_path)

    def build(self, *, param_dtype: torch.dtype, device: torch.device, seed: int) -> LanguageModel:
        """The model in training mode on ``device``. Raises ``UserError`` when weights are missing from its files."""
        from transformers import AutoModelForCausalLM

        hf, loaded = AutoModelForCausalLM.from_pretrained(
            str(self.folder()),
            dtype=param_dtype,
            attn_implementation=self.attention,
            trust_remote_code=self.trust_remote_code,
            output_loading_info=True,
        )
        missing = sorted(loaded["missing_keys"])
        if missing:
            raise UserError(f"model_name={self.name_or_path}: its files lack {len(missing)} weights, e.g. {missing[0]}")
        return self._finish(hf, device)


@dataclass(frozen=True, kw_only=True)
class Scratch(CausalLM):
    """Random weights under the run's seed. ``overrides``: config values on top of the named model's; with a ``model_type``
    among them they are the whole config. ``train_tokenizer``: vocabulary size of a byte-level BPE trained on the run's own
    training documents, instead of an existing tokenizer."""

    overrides: dict[str, Any] = field(default_factory=dict)
    train_tokenizer: PositiveInt | None = None

    def config(self) -> dict[str, Any]:
        base = {} if "model_type" in self.overrides else super().config()
        size = {"vocab_size": self.train_tokenizer} if self.train_tokenizer else {}
        return base | self.overrides | size

    def check(self, sequence_length: int) -> None:
        """Raises ``UserError`` for a config that can't be used. No torch."""
        config = self.config()
        if not _is_known(config["model_type"]) and not self.trust_remote_code:
            raise UserError(f"model.overrides.model_type={config['model_type']!r}: transformers has no such model")
        check_positions(config, sequence_length, config["model_type"])

    def tokenizer(self, texts: Texts | None) -> Any:
        if self.train_tokenizer is None:
            return super().tokenizer(texts)
        if texts is None:
            raise UserError(
                "model.train_tokenizer: only a pretraining or tokenization task has documents to train it on"
            )
        from pretrain.models.bpe import train_bpe

        return train_bpe(texts(), vocab_size=self.train_tokenizer)

    def build(self, *, param_dtype: torch.dtype, device: torch.device, seed: int) -> LanguageModel:
        """A model with random weights, the same for the same seed, in training mode on ``device``."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        values = self.config()
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=self.attention)
        return self._finish(hf.to(param_dtype), device)


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
