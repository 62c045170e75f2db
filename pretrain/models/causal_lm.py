"""The origin of a run's model: a pretrained folder or Hub id, or a config with random weights.

Specs hold values from YAML; torch and transformers are imported when the model is built. Remote code is off by default, and
pickled weights are never read.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import xxhash
from pydantic import Field, PositiveInt

from pretrain.config.check import gpu_visible
from pretrain.models.hub import config_files as model_config
from pretrain.models.hub import files
from pretrain.models.overrides import OLD_CONFIG_KEYS, check_known, check_overrides, default_keys, overridden, positions
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    import torch

    from pretrain.distributed.sharding import TensorFiles
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.transforms.apply import Transformed

Texts = Callable[[], Iterator[str]]
Checkpointing = bool | Literal["selective"] | PositiveInt
Change = Callable[[Any], "Transformed | None"]  # applies transforms to a transformers model in place


def _unchanged(hf: Any) -> None:
    """Apply no transform."""


@dataclass(frozen=True, kw_only=True)
class CausalLM(ABC):
    """The settings that both kinds of model share.

    Attributes:
        name_or_path: The shipped `sample`, a local folder or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        tokenizer_name: Folder or Hub id of another tokenizer; null: the model's own tokenizer.
        attention: auto (sdpa, on a GPU with the fastest kernel) · sdpa · eager · flash_attention_2 · flex_attention.
        gradient_checkpointing: true: recompute the activations inside blocks, a third slower, far less memory · selective: all
            but matrix products and attention · N: only every Nth block.
        activation_offload: true: keep activations in host memory until the backward; on a GPU only.
        compile: true: use torch.compile, block by block; the first step takes longer. graph: the whole model at once.
        trust_remote_code: true: run Python code that is shipped with the model; on the command line only.
        save_dtype: Dtype of the final model's weights: float32 · bfloat16 · float16; null: the dtype used in training.
    """

    name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    tokenizer_name: str | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    gradient_checkpointing: Checkpointing = False
    activation_offload: bool = False
    compile: Literal["blocks", "graph"] | bool = False
    trust_remote_code: bool = False
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @abstractmethod
    def check(self, sequence_length: int) -> None:
        """Raise ``UserError`` for a model that is not available, or a sequence longer than its positions."""

    def folder(self) -> Path:
        """Return the folder of the model; a Hub repository is downloaded first."""
        return files.model_folder(self.name_or_path, revision=self.revision, code=self.trust_remote_code)

    def tokenizer_folder(self) -> Path:
        """Return the folder of the tokenizer, which is the model's own unless ``tokenizer_name`` is set."""
        if self.tokenizer_name is None:
            return self.folder()
        return files.model_folder(self.tokenizer_name, key="model.tokenizer_name", code=self.trust_remote_code)

    def config(self) -> dict[str, Any]:
        """Return config.json as a dict. Raises ``UserError`` when it is missing, or when it needs remote code and that is off."""
        config = files.read_config(self.folder(), self.name_or_path)
        if not model_config.is_known(config["model_type"]):
            if "auto_map" not in config:
                raise UserError(
                    f"model_name={self.name_or_path}: transformers has no causal language model of type {config['model_type']!r}"
                )
            if not self.trust_remote_code:
                raise UserError(
                    f"model_name={self.name_or_path}: its model_type {config['model_type']!r} needs the code in its folder, "
                    "which would run on this machine; if you trust its author: model.trust_remote_code=true"
                )
        return config

    def tokenizer(self, texts: Texts | None) -> Any:
        """Return the tokenizer, a fast one of transformers. ``texts`` are the training documents, for a spec that trains its own.

        Raises ``UserError`` when there is no tokenizer, or when it has tokens for which the model has no embedding.
        """
        from pretrain.models.tokenizer import folder_tokenizer

        tokenizer = folder_tokenizer(self.tokenizer_folder(), code=self.trust_remote_code)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        files.check_vocabulary(self.config(), largest + 1, self.name_or_path)
        return tokenizer

    def check_offload(self) -> None:
        """Print a notice if ``activation_offload`` can have no effect here."""
        if self.activation_offload and not gpu_visible():
            notice("model.activation_offload=true: has no effect without a GPU: activations are in host memory already")

    def load(self, make: Callable[..., Any], **given: Any) -> Any:
        """Call ``make`` with this spec's attention, or with eager attention for an architecture without sdpa."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # the run shows its own progress bar
        given |= {"trust_remote_code": self.trust_remote_code}
        attention = "sdpa" if self.attention == "auto" else self.attention
        try:
            return make(attn_implementation=attention, **given)
        except Exception as error:  # invalid config values raise errors of any type
            if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
                notice(f"model.attention={self.attention}: {self.name_or_path} has no sdpa; it runs with eager")
                return make(attn_implementation="eager", **given)
            if is_out_of_memory(error) or isinstance(error, UserError):
                raise
            raise UserError(f"model_name={self.name_or_path}: can't be built: {one_line(error, lines=2)}") from None

    def hf_config(self) -> Any:
        """Return the transformers config object. Raises ``UserError`` when it can't be read or when the weights are quantized."""
        from transformers import AutoConfig

        config, folder = self.config(), self.folder()
        model_config.check_unquantized(config, self.name_or_path)
        model_config.check_sizes(config, self.name_or_path)
        try:
            if "auto_map" in config and self.trust_remote_code:
                overrides = deepcopy(getattr(self, "overrides", {}))  # transformers changes nested values
                return AutoConfig.from_pretrained(str(folder), trust_remote_code=True, **overrides)
            return model_config.config_object(config, folder)
        except Exception as error:  # its validation raises errors of any type
            raise UserError(
                f"model_name={self.name_or_path}: {folder / 'config.json'}: {one_line(error, lines=2)}"
            ) from None

    def uniform_loss(self) -> float | None:
        """Return the loss (nats per token) of a uniform distribution over the vocabulary, or ``None`` for random weights, of
        which no lower loss is expected."""
        return None

    def num_parameters(self) -> int:
        """Return the number of parameters of the model without allocating its weights."""
        import torch

        return int(self.build_on_meta(param_dtype=torch.float32).hf.num_parameters())

    def build_on_meta(self, *, param_dtype: torch.dtype, change: Change = _unchanged) -> LanguageModel:
        """Return the model in training mode, changed by ``change``, with its parameters on the meta device and its buffers on
        the CPU."""
        from transformers import AutoModelForCausalLM

        from pretrain.models.dtypes import keep_fp32
        from pretrain.models.meta import parameters_on_meta

        def make(**given: Any) -> Any:
            with parameters_on_meta():
                return AutoModelForCausalLM.from_config(self.hf_config(), dtype=param_dtype, **given)

        hf = self.load(make)
        keep_fp32(hf, param_dtype)
        return self.finish(hf, None, change)

    def finish(self, hf: Any, device: torch.device | None, change: Change) -> LanguageModel:
        """Change ``hf`` by ``change``, wrap it and return it in training mode on ``device``; with ``None`` it stays where it is.
        Dropout is as its config sets it."""
        from pretrain.models.activation_checkpointing import checkpoint_activations, offload_activations
        from pretrain.models.compilation import keep_compiled_code, prepare_compilation
        from pretrain.models.language_model import LanguageModel

        transformed = change(hf)
        checkpoint_activations(hf, self.gradient_checkpointing)
        if self.activation_offload:
            offload_activations(hf)
        if self.compile:
            prepare_compilation()
        elif self.attention == "flex_attention" or self.trust_remote_code:
            keep_compiled_code()  # transformers compiles the kernel of the former, and the latter may compile anything
        model = LanguageModel(hf if device is None else hf.to(device), compile=self.compile, transformed=transformed)
        model.picks_kernels = self.attention == "auto"
        return model.train()


@dataclass(frozen=True, kw_only=True)
class Pretrained(CausalLM):
    """A model with existing weights, for continual pretraining.

    Attributes:
        overrides: Values of the model's config that change no weights, e.g. {rope_scaling: {rope_type: yarn, factor: 4.0}}.
    """

    overrides: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return overridden(super().config(), self.overrides)

    def check(self, sequence_length: int) -> None:
        """Raise ``UserError`` for an incomplete model folder, a tokenizer that does not fit, a sequence beyond its positions, or
        overrides that change weights. Only the last checks, of architecture and overrides, import torch."""
        folder = self.folder()
        config = files.read_config(folder, self.name_or_path)
        files.check_positions(positions(overridden(config, self.overrides)), sequence_length, self.name_or_path)
        files.check_weights(folder, self.name_or_path)
        files.check_layers(config, folder, self.name_or_path)
        model_config.read_generation_config(folder, self.name_or_path)
        files.check_vocabulary(config, files.vocabulary_size(self.tokenizer_folder()), self.name_or_path)
        self.check_offload()
        if self.overrides:
            check_overrides(self, config["model_type"], known=model_config.is_known(config["model_type"]))
        self.hf_config()

    def identity(self) -> str:
        """Return a hash of config, overrides and weights. It does not depend on where the folder is."""
        folder = self.folder()
        content = files.fingerprint([folder / "config.json", *files.weight_files(folder, self.name_or_path)])
        return content if not self.overrides else f"{content} {json.dumps(self.overrides, sort_keys=True)}"

    def weights(self) -> TensorFiles:
        """Return the folder's weight files. Their tensors are read later."""
        from pretrain.distributed.sharding import TensorFiles

        return TensorFiles(files.weight_files(self.folder(), self.name_or_path))

    def uniform_loss(self) -> float | None:
        rows = files.text_part(self.config()).get("vocab_size")
        return math.log(rows) if isinstance(rows, int) and rows > 0 else None

    def num_parameters(self) -> int:
        """Return the number of values in the weight files, which their headers give."""
        found = self.weights()
        return sum(math.prod(found.shape(name)) for name in found.keys())  # noqa: SIM118 (not a dict)

    def build_on_meta(self, *, param_dtype: torch.dtype, change: Change = _unchanged) -> LanguageModel:
        model = super().build_on_meta(param_dtype=param_dtype, change=change)
        self._adopt_generation_config(model.hf)
        return model

    def _adopt_generation_config(self, hf: Any) -> None:
        """Set the folder's generation config, as ``from_pretrained`` does for a model that it reads itself."""
        found = model_config.generation_config(self.folder(), self.name_or_path)
        if found is not None:
            hf.generation_config = found

    def _reader(self, param_dtype: torch.dtype) -> Callable[..., Any]:
        """Return ``from_pretrained`` bound to the folder, or to weights that are sharded along dim 0, which it can't read."""
        from transformers import AutoModelForCausalLM

        if not any(self.folder().glob(files.PIECES)):
            found = model_config.generation_config(self.folder(), self.name_or_path)
            given = {"config": self.hf_config(), "generation_config": found}
            return partial(AutoModelForCausalLM.from_pretrained, str(self.folder()), **given)
        architecture, pieces = type(self.build_on_meta(param_dtype=param_dtype).hf), self.weights()
        weights = {name: pieces.read(name) for name in sorted(pieces.keys())}
        return partial(architecture.from_pretrained, None, config=self.hf_config(), state_dict=weights)

    def build(
        self, *, param_dtype: torch.dtype, device: torch.device, seed: int, change: Change = _unchanged
    ) -> LanguageModel:
        """Return the model, changed by ``change``, in training mode on ``device``. Raises ``UserError`` when weights are missing
        from its files."""
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
                f"model_name={self.name_or_path}: {len(wrong)} weights are missing from its files or have "
                f"another shape, e.g. {wrong[0]}"
            )
        if loaded["unexpected_keys"]:
            unused = sorted(loaded["unexpected_keys"])
            notice(f"model_name={self.name_or_path}: {len(unused)} tensors in its files are not used, e.g. {unused[0]}")
        self._check_ties(hf)
        self._adopt_generation_config(hf)
        return self.finish(hf, device, change)

    def _check_ties(self, hf: Any) -> None:
        """Raise ``UserError`` when config.json ties the head to the embedding but the files hold a different head. transformers
        then loads both, so it would be undefined which model is trained and what its config means."""
        if _is_tied(hf) or not getattr(hf.config.get_text_config(), "tie_word_embeddings", False):
            return
        if _is_tied(self.build_on_meta(param_dtype=hf.dtype).hf):
            raise UserError(
                f"model_name={self.name_or_path}: {self.folder() / 'config.json'} sets tie_word_embeddings: true, but the weight "
                "files hold a head that is not the embedding; set it to false, or remove the head from the files"
            )


@dataclass(frozen=True, kw_only=True)
class Scratch(CausalLM):
    """A model with random weights, drawn with the run's seed.

    Attributes:
        train_tokenizer: Vocabulary size of a byte-level BPE tokenizer to train on the training documents; null: none.
        overrides: Values of the model's config, e.g. {num_hidden_layers: 4}.
    """

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
        """Raise ``UserError`` for a config that can't be used. No weights are allocated."""
        config = self.config()
        kind = config["model_type"]
        if not model_config.is_known(kind) and not self.trust_remote_code:
            raise UserError(f"model.overrides.model_type={kind!r}: transformers has no such model type")
        if model_config.is_known(kind):
            check_known(self.overrides, default_keys(kind) | OLD_CONFIG_KEYS, kind)
            config = self.hf_config().to_dict()
        files.check_positions(config, sequence_length, kind)
        if self.train_tokenizer is None:
            files.check_vocabulary(config, files.vocabulary_size(self.tokenizer_folder()), kind)
        self.check_offload()

    def weights(self) -> None:
        """Return ``None``: there are no weight files."""

    def identity(self) -> str:
        """Return a hash of the config."""
        return xxhash.xxh3_64_hexdigest(repr(sorted(self.config().items())).encode())

    def hf_config(self) -> Any:
        """Return the transformers config object. Raises ``UserError`` when the architecture rejects the values."""
        from transformers import AutoConfig

        config = self.config()
        try:
            if not model_config.is_known(config["model_type"]):
                return AutoConfig.from_pretrained(
                    str(self.folder()), trust_remote_code=True, **deepcopy(self.overrides)
                )
            config.pop("quantization_config", None)  # it describes weights that are not used
            return AutoConfig.for_model(**model_config.without_kernels(config))
        except Exception as error:  # its validation raises errors of any type
            raise UserError(f"model.overrides: {one_line(error, lines=2)}") from None

    def tokenizer(self, texts: Texts | None) -> Any:
        if self.train_tokenizer is None:
            return super().tokenizer(texts)
        if texts is None:
            raise UserError("model.train_tokenizer: only pretraining and tokenization have documents to train it on")
        from pretrain.models.bpe import train_bpe

        return train_bpe(texts(), vocab_size=self.train_tokenizer)

    def build(
        self, *, param_dtype: torch.dtype, device: torch.device, seed: int, change: Change = _unchanged
    ) -> LanguageModel:
        """Return the model with random weights, changed by ``change``, in training mode on ``device``. The weights are drawn on
        the CPU, so the same seed gives the same weights on every device."""
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
        return self.finish(hf, device, change)


def _is_tied(hf: Any) -> bool:
    """Return whether head and embedding are one tensor."""
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    return head is not None and head.weight is embedding.weight
