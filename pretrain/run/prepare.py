"""Prepare a run before any process trains: check the model's folder, load its tokenizer, and tokenize all text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import xxhash

from pretrain.runtime.errors import UserError
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.data.store.token_store import TokenView
    from pretrain.data.training_data import TrainingData
    from pretrain.models.tokenizer import Boundaries
    from pretrain.models.transforms.base import ModelTransform
    from pretrain.run.missing_model import ModelInCheckpoint


def model_spec(config: RunConfig) -> Any:
    """Return the model that the config names; the name of a run or a checkpoint stands for its weights.

    Raises ``UserError`` for an incomplete checkpoint, and for one whose weights are transformed in another way than by this
    config.
    """
    from pretrain.checkpoint.weights import check_transforms, weights_folder

    spec, verify, transforms = config.model, config.checkpoint.verify, config.transforms_identity
    folder = weights_folder(spec.name_or_path, key="model_name", verify=verify, transforms=transforms)
    tokenizer = spec.tokenizer_name and weights_folder(spec.tokenizer_name, key="model.tokenizer_name", verify=verify)
    spec = replace(spec, name_or_path=folder, tokenizer_name=tokenizer)
    if not hasattr(spec, "train_tokenizer"):  # a model from scratch has no weights
        check_transforms(spec.folder(), transforms, name=config.model_name)
    return spec


def _checked_model(config: RunConfig) -> tuple[Any, ModelInCheckpoint | None]:
    """Return the checked model of the config, or that of the resumed checkpoint where the model no longer exists.

    Raises ``UserError`` where neither can be used.
    """
    from pretrain.run.missing_model import model_in_checkpoint

    length = config.sequence_length
    try:
        model = model_spec(config)
        model.check(length)
        return model, None
    except UserError:
        found = model_in_checkpoint(config)
        if found is None:
            raise
    model = found.apply_to(config.model)
    model.check(length)
    return model, found


@dataclass(frozen=True)
class Prepared:
    """The model, tokenizer and tokenized data of a run.

    Attributes:
        model: The model, checked and not yet built.
        tokenizer: Its tokenizer.
        train: The training documents as tokens, by part.
        domains: Name, role and held-out documents of each evaluation domain.
        identity: What a checkpoint must share with the run so that it can be resumed.
        boundaries: The tokens before and between documents.
        total_steps: Optimizer steps of the run; 0 where the task trains nothing.
        notices: Messages about model and domains that are printed once in a run.
        transforms: The transforms of the model, prepared for its tokenizer.
        base_gone: The base model no longer exists; ``model`` is the one in a checkpoint of the run.
    """

    model: Any
    tokenizer: Any
    train: TrainingData
    domains: list[tuple[str, str, TokenView]]
    identity: dict[str, Any]
    boundaries: Boundaries
    total_steps: int = 0
    notices: Sequence[str] = ()
    base_gone: bool = False
    transforms: tuple[ModelTransform, ...] = ()

    @property
    def global_batch(self) -> int:
        """Return the sequences in one optimizer step, over all devices and micro-batches."""
        return int(self.identity["global_batch"])


def prepare(config: RunConfig, *, devices: int = 1) -> Prepared:
    """Check the model's folder, load its tokenizer, and tokenize the text that is not in the cache yet.

    Args:
        config: The config of the run.
        devices: Number of devices of all processes; each computes ``batch_size`` sequences at a time.

    Raises:
        UserError: The model or the data can't be used, or there is too little text to train on.
    """
    from pretrain.data.tokenization.tokenize import training_texts
    from pretrain.models.tokenizer import boundaries
    from pretrain.run.prepare_data import (
        TokenizedSources,
        places_of,
        removed_documents,
        scored_domains,
        total_steps,
        training_data,
    )

    model, replacement = _checked_model(config)
    dataset, global_batch = config.dataset, MicroBatching.from_config(config).total * devices

    def documents() -> Iterator[str]:
        return chain.from_iterable(map(training_texts, dataset.sources().values()))

    plain = model.tokenizer(documents)
    tokenizer, transforms = prepare_transforms(config, model, plain, documents if trains(config) else None)
    boundary_tokens = boundaries(tokenizer, bos=dataset.bos, separator=dataset.separator)
    texts = TokenizedSources(tokenizer, boundary_tokens, places_of(config))
    train, content = training_data(config, texts)
    domains, notices = scored_domains(config, texts)
    steps = total_steps(config, train, global_batch) if config.task == "pretraining" else 0
    identity = {
        "model": replacement.identity if replacement else model.identity(),
        "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer.backend_tokenizer.to_str().encode()),
        "data": content,
        "global_batch": global_batch,
        **_config_identity(config),
    }
    if len(train.parts) > 1:
        identity["mixture"] = train.table(steps=steps, global_batch=global_batch)
    notices = ([replacement.notice] if replacement else []) + notices + removed_documents(dataset, texts)
    if tokenizer is not plain:
        notices += fertilities(plain, tokenizer, train, domains)
    found = (model, tokenizer, train, domains, identity, boundary_tokens, steps, notices)
    return Prepared(*found, base_gone=replacement is not None, transforms=transforms)


def trains(config: RunConfig) -> bool:
    """Return whether the task reads the training documents."""
    return config.task in ("pretraining", "tokenization")


def is_transformed(model: Any) -> bool:
    """Return whether the folder of ``model`` is a checkpoint whose weights transforms have changed."""
    from pretrain.checkpoint.weights import saved_transforms

    return model.weights() is not None and bool(saved_transforms(model.folder()))


def prepare_transforms(
    config: RunConfig, model: Any, tokenizer: Any, texts: Callable[[], Iterator[str]] | None = None
) -> tuple[Any, tuple[ModelTransform, ...]]:
    """Return the tokenizer after the transforms of the config, and the transforms that are applied to ``model``."""
    prepared = []
    for transform in config.transforms:
        if hasattr(transform, "prepare"):  # a class without the base class may have none
            given = {"in_checkpoint": is_transformed(model)}
            tokenizer, transform = transform.prepare(tokenizer, model.tokenizer_folder(), texts, **given)
        prepared.append(transform)
    return tokenizer, tuple(prepared)


SHOWN_TOKENS = 200_000  # of a domain, on which tokens for each word are counted


def fertilities(old: Any, new: Any, train: TrainingData, domains: Sequence[tuple[str, str, TokenView]]) -> list[str]:
    """Return a line for the training documents and each domain with the tokens for each word and byte before and after."""
    from pretrain.models.grown_tokenizer import fertility

    views = [("training", train.parts[0].view), *((f"{name} ({role})", view) for name, role, view in domains)]
    lines = []
    for name, view in views:
        text = new.decode(view.read(0, min(SHOWN_TOKENS, view.num_tokens)).tolist(), skip_special_tokens=True)
        lines.append(f"vocabulary: {name}: {fertility([text], old, new)}")
    return [*lines, "vocabulary: tokens are others than before, so compare bits_per_byte, not perplexity"]


def _config_identity(config: RunConfig) -> dict[str, Any]:
    """Return the part of the run's identity that the config alone determines."""
    return {
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "weights": config.precision.weights,
        "optimizer": config.optimizer_identity,
        "objective": config.objective_identity,
        "transforms": config.transforms_identity,
    }
