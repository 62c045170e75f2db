"""Where a run's model comes from: a pretrained folder or Hub id, or a config with random weights.

Specs are values from YAML; torch and transformers are imported when the model is built. Remote code stays off unless
asked for, and pickled weights are never read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import xxhash
from pydantic import Field

from pretrain.models.hub import config_files as model_config
from pretrain.models.hub import files
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, did_you_mean, one_line
from pretrain.runtime.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    import torch

    from pretrain.distributed.sharding import TensorFiles
    from pretrain.models.language_model import LanguageModel

Texts = Callable[[], Iterator[str]]
OLD_CONFIG_KEYS = {"rope_theta", "rope_scaling", "torch_dtype"}  # transformers still takes them and renames them


@dataclass(frozen=True, kw_only=True)
class CausalLM(ABC):
    """What both kinds share. ``tokenizer_name``: a folder or Hub id, if not the model's own. ``revision``: of a Hub id.
    ``save_dtype``: type of the weights in the final folder (``None``: as they were trained)."""

    name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    tokenizer_name: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    trust_remote_code: bool = False
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @abstractmethod
    def check(self, sequence_length: int) -> None:
        """Raises ``UserError`` for a model that can't be had, or a sequence it has no positions for."""

    def folder(self) -> Path:
        return files.model_folder(self.name_or_path, revision=self.revision, code=self.trust_remote_code)

    def tokenizer_folder(self) -> Path:
        if self.tokenizer_name is None:
            return self.folder()
        return files.model_folder(self.tokenizer_name, key="model.tokenizer_name", code=self.trust_remote_code)

    def config(self) -> dict[str, Any]:
        """config.json as a dict. Raises ``UserError`` when there is none, or when it needs remote code that is off."""
        config = files.read_config(self.folder(), self.name_or_path)
        if not _is_known(config["model_type"]):
            if "auto_map" not in config:
                raise UserError(f"model_name={self.name_or_path}: transformers has no causal {config['model_type']!r}")
            if not self.trust_remote_code:
                raise UserError(
                    f"model_name={self.name_or_path}: its model_type {config['model_type']!r} brings code of its own, "
                    "which would run on this machine; if you trust its author: model.trust_remote_code=true"
                )
        return config

    def tokenizer(self, texts: Texts | None) -> Any:
        """The tokenizer (a fast transformers one). ``texts``: the training documents, for a spec that trains its own.

        Raises ``UserError`` when there is none or it has tokens that the model has no embedding for.
        """
        from pretrain.models.tokenizer import folder_tokenizer

        tokenizer = folder_tokenizer(self.tokenizer_folder(), code=self.trust_remote_code)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        files.check_vocabulary(self.config(), largest + 1, self.name_or_path)
        return tokenizer

    def load(self, make: Callable[..., Any], **given: Any) -> Any:
        """``make`` with this spec's attention; with eager attention for an architecture that has no sdpa."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # the run has its own
        given |= {"trust_remote_code": self.trust_remote_code}
        try:
            return make(attn_implementation=self.attention, **given)
        except Exception as error:  # whatever a foreign config's values make of its architecture
            if self.attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                notice(f"model.attention=sdpa: {self.name_or_path} has no such attention; it runs with eager")
                return make(attn_implementation="eager", **given)
            if is_out_of_memory(error) or isinstance(error, UserError):
                raise
            raise UserError(f"model_name={self.name_or_path}: can't be built: {one_line(error, lines=2)}") from None

    def hf_config(self) -> Any:
        """The transformers config object. Raises ``UserError`` when it can't be read, or is of quantized weights."""
        from transformers import AutoConfig

        config, folder = self.config(), self.folder()
        model_config.check_unquantized(config, self.name_or_path)
        model_config.check_sizes(config, self.name_or_path)
        try:
            if "auto_map" in config and self.trust_remote_code:
                return AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
            return model_config.config_object(config, folder)
        except Exception as error:  # whatever its validation raises
            raise UserError(
                f"model_name={self.name_or_path}: {folder / 'config.json'}: {one_line(error, lines=2)}"
            ) from None

    def uniform_loss(self) -> float | None:
        """Nats per token of a guess among all tokens alike; ``None``: the weights are random, nothing better is expected."""
        return None

    def num_parameters(self) -> int:
        """Of the model, without making its weights."""
        import torch

        return int(self.build_on_meta(param_dtype=torch.float32).hf.num_parameters())

    def build_on_meta(self, *, param_dtype: torch.dtype) -> LanguageModel:
        """The model in training mode with its parameters on the meta device and its buffers on the CPU."""
        from transformers import AutoModelForCausalLM

        from pretrain.models.dtypes import keep_fp32
        from pretrain.models.meta import parameters_on_meta

        def make(**given: Any) -> Any:
            with parameters_on_meta():
                return AutoModelForCausalLM.from_config(self.hf_config(), dtype=param_dtype, **given)

        hf = self.load(make)
        keep_fp32(hf, param_dtype)
        return self.finish(hf, None)

    def finish(self, hf: Any, device: torch.device | None) -> LanguageModel:
        """The model in training mode on ``device`` (``None``: where it is). Dropout is as its config has it."""
        from pretrain.models.language_model import LanguageModel

        if self.gradient_checkpointing:
            hf.activation_checkpointing_enable({"use_reentrant": False})
        model = LanguageModel(hf if device is None else hf.to(device), compile=self.compile)
        model.train()
        return model


@dataclass(frozen=True, kw_only=True)
class Pretrained(CausalLM):
    """Continue from existing weights."""

    def check(self, sequence_length: int) -> None:
        """Raises ``UserError`` for a folder that is no whole model, a tokenizer that is another's, or a sequence it has
        no positions for. Torch is imported, by transformers, for the last question only: is the architecture known."""
        folder = self.folder()
        config = files.read_config(folder, self.name_or_path)
        files.check_positions(config, sequence_length, self.name_or_path)
        files.check_weights(folder, self.name_or_path)
        files.check_layers(config, folder, self.name_or_path)
        model_config.read_generation_config(folder, self.name_or_path)
        files.check_vocabulary(config, files.vocabulary_size(self.tokenizer_folder()), self.name_or_path)
        self.hf_config()

    def identity(self) -> str:
        """Changes with config and weights; where they lie, and how that was typed, is no part of it."""
        folder = self.folder()
        return files.fingerprint([folder / "config.json", *files.weight_files(folder, self.name_or_path)])

    def weights(self) -> TensorFiles:
        """The folder's weight files, unread."""
        from pretrain.distributed.sharding import TensorFiles

        return TensorFiles(files.weight_files(self.folder(), self.name_or_path))

    def uniform_loss(self) -> float | None:
        rows = files.text_part(self.config()).get("vocab_size")
        return math.log(rows) if isinstance(rows, int) and rows > 0 else None

    def num_parameters(self) -> int:
        """Numbers in the weight files; their headers say how many."""
        found = self.weights()
        return sum(math.prod(found.shape(name)) for name in found.keys())  # noqa: SIM118 (not a dict)

    def build_on_meta(self, *, param_dtype: torch.dtype) -> LanguageModel:
        model = super().build_on_meta(param_dtype=param_dtype)
        self._adopt_generation_config(model.hf)
        return model

    def _adopt_generation_config(self, hf: Any) -> None:
        """What ``from_pretrained`` does for a model that it reads from its folder."""
        found = model_config.generation_config(self.folder(), self.name_or_path)
        if found is not None:
            hf.generation_config = found

    def _reader(self, param_dtype: torch.dtype) -> Callable[..., Any]:
        """``from_pretrained`` of the folder; where weights lie in pieces of rows, which it can't read, of themselves."""
        from transformers import AutoModelForCausalLM

        if not any(self.folder().glob(files.PIECES)):
            found = model_config.generation_config(self.folder(), self.name_or_path)
            given = {"config": self.hf_config(), "generation_config": found}
            return partial(AutoModelForCausalLM.from_pretrained, str(self.folder()), **given)
        architecture, pieces = type(self.build_on_meta(param_dtype=param_dtype).hf), self.weights()
        weights = {name: pieces.read(name) for name in sorted(pieces.keys())}
        return partial(architecture.from_pretrained, None, config=self.hf_config(), state_dict=weights)

    def build(self, *, param_dtype: torch.dtype, device: torch.device, seed: int) -> LanguageModel:
        """The model in training mode on ``device``. Raises ``UserError`` when weights are missing from its files."""
        hf, loaded = self.load(
            self._reader(param_dtype),
            dtype=param_dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
        )
        wrong = [*sorted(loaded["missing_keys"]), *(str(key[0]) for key in loaded["mismatched_keys"])]
        if wrong:
            raise UserError(
                f"model_name={self.name_or_path}: {len(wrong)} weights are not in its files as needed, e.g. {wrong[0]}"
            )
        if loaded["unexpected_keys"]:
            unused = sorted(loaded["unexpected_keys"])
            notice(f"model_name={self.name_or_path}: {len(unused)} tensors in its files are not used, e.g. {unused[0]}")
        self._check_ties(hf)
        self._adopt_generation_config(hf)
        return self.finish(hf, device)

    def _check_ties(self, hf: Any) -> None:
        """Raises ``UserError`` where config.json ties the head to the embedding and the files hold another head: transformers
        then takes both, and nothing would say which model is trained, or what its config means."""
        if _is_tied(hf) or not getattr(hf.config.get_text_config(), "tie_word_embeddings", False):
            return
        if _is_tied(self.build_on_meta(param_dtype=hf.dtype).hf):
            raise UserError(
                f"model_name={self.name_or_path}: {self.folder() / 'config.json'} says tie_word_embeddings: true, but the weight "
                "files hold a head that is not the embedding; set it to false, or remove the head from the files"
            )


@dataclass(frozen=True, kw_only=True)
class Scratch(CausalLM):
    """Random weights under the run's seed. ``overrides``: config values on top of the named model's; with a
    ``model_type`` among them they are the whole config. ``train_tokenizer``: vocabulary size of a byte-level BPE
    trained on the run's own training documents, instead of an existing tokenizer."""

    overrides: dict[str, Any] = field(default_factory=dict)
    train_tokenizer: Annotated[int, Field(ge=257)] | None = None  # 256 bytes and the end of text

    def config(self) -> dict[str, Any]:
        base = {} if "model_type" in self.overrides else super().config()
        config = base | self.overrides
        if self.train_tokenizer is not None:
            from pretrain.models.bpe import END_OF_TEXT_ID

            special = dict.fromkeys(("bos_token_id", "eos_token_id"), END_OF_TEXT_ID)
            return config | special | {"pad_token_id": None, "vocab_size": self.train_tokenizer}
        return {"vocab_size": files.vocabulary_size(self.tokenizer_folder())} | config

    def check(self, sequence_length: int) -> None:
        """Raises ``UserError`` for a config that can't be used. No weights are made."""
        config = self.config()
        kind = config["model_type"]
        if not _is_known(kind) and not self.trust_remote_code:
            raise UserError(f"model.overrides.model_type={kind!r}: transformers has no such model")
        if _is_known(kind):
            known = set(_default_config(kind)) | OLD_CONFIG_KEYS
            for key in self.overrides:
                if key not in known:
                    raise UserError(f"model.overrides: {kind} has no {key!r}{did_you_mean(key, known)}")
            config = self.hf_config().to_dict()
        files.check_positions(config, sequence_length, kind)
        if self.train_tokenizer is None:
            files.check_vocabulary(config, files.vocabulary_size(self.tokenizer_folder()), kind)

    def weights(self) -> None:
        """There are none: they are drawn."""

    def identity(self) -> str:
        return xxhash.xxh3_64_hexdigest(repr(sorted(self.config().items())).encode())

    def hf_config(self) -> Any:
        """Raises ``UserError`` when the architecture refuses the values."""
        from transformers import AutoConfig

        config = self.config()
        try:
            if not _is_known(config["model_type"]):
                return AutoConfig.from_pretrained(str(self.folder()), trust_remote_code=True, **self.overrides)
            config.pop("quantization_config", None)  # of weights that are not used
            return AutoConfig.for_model(**model_config.without_kernels(config))
        except Exception as error:  # whatever its validation raises
            raise UserError(f"model.overrides: {one_line(error, lines=2)}") from None

    def tokenizer(self, texts: Texts | None) -> Any:
        if self.train_tokenizer is None:
            return super().tokenizer(texts)
        if texts is None:
            raise UserError("model.train_tokenizer: only pretraining and tokenization have documents to train it on")
        from pretrain.models.bpe import train_bpe

        return train_bpe(texts(), vocab_size=self.train_tokenizer)

    def build(self, *, param_dtype: torch.dtype, device: torch.device, seed: int) -> LanguageModel:
        """Random weights, drawn on the CPU: the same for the same seed on every device. In training mode."""
        import torch
        from transformers import AutoModelForCausalLM

        from pretrain.models.dtypes import cast

        def make(**given: Any) -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return AutoModelForCausalLM.from_config(self.hf_config(), dtype=torch.float32, **given)

        hf = self.load(make)
        cast(hf, param_dtype)
        hf.config.dtype = param_dtype
        return self.finish(hf, device)


def _is_tied(hf: Any) -> bool:
    """Whether head and embedding are one weight."""
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _default_config(model_type: str) -> list[str]:
    """All keys that a config of this type may have, old names of them too."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    return [*config.to_dict(), *config.attribute_map]
