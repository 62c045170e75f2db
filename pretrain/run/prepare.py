"""Prepare a run before any process trains: check the model's folder, load its tokenizer, and tokenize all text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import xxhash

from pretrain.data.domains import base_domains, view_options
from pretrain.runtime.errors import UserError
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.data.sources.base import Source
    from pretrain.data.store.token_store import TokenStore, TokenView
    from pretrain.models.tokenizer import Boundaries
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
    if not hasattr(spec, "overrides"):  # a model from scratch has no weights
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
        train: The training documents as tokens.
        domains: Name, role and held-out documents of each evaluation domain.
        identity: What a checkpoint must share with the run so that it can be resumed.
        boundaries: The tokens before and between documents.
        notices: Messages about model and domains that are printed once in a run.
        base_gone: The base model no longer exists; ``model`` is the one in a checkpoint of the run.
    """

    model: Any
    tokenizer: Any
    train: TokenView
    domains: list[tuple[str, str, TokenView]]
    identity: dict[str, Any]
    boundaries: Boundaries
    notices: Sequence[str] = ()
    base_gone: bool = False

    @property
    def global_batch(self) -> int:
        """Return the sequences in one optimizer step, over all devices and micro-batches."""
        return int(self.identity["global_batch"])

    @property
    def sequences(self) -> int:
        """Return the sequences in one epoch of the training documents."""
        from pretrain.data.blocks import Blocks

        return len(Blocks(self.train, self.identity["sequence_length"]))


def prepare(config: RunConfig, *, devices: int = 1) -> Prepared:
    """Check the model's folder, load its tokenizer, and tokenize the text that is not in the cache yet.

    Args:
        config: The config of the run.
        devices: Number of devices of all processes; each computes ``batch_size`` sequences at a time.

    Raises:
        UserError: The model or the data can't be used.
    """
    from pretrain.data.tokenization.tokenize import training_texts
    from pretrain.models.tokenizer import boundaries

    model, replacement = _checked_model(config)
    source = config.dataset
    tokenizer = model.tokenizer(partial(training_texts, source))
    boundary_tokens = boundaries(tokenizer, bos=source.bos, separator=source.separator)
    store = tokenized(source, tokenizer, boundary_tokens)
    train, held_out = views(store, source)
    domains = [(source.domain, "new", held_out)] if held_out.num_tokens > 1 else []
    configured = config.evaluation.domains
    bases = base_domains(source, configured)
    for name, base in bases.items():
        base_store = tokenized(base, tokenizer, domain_boundaries(base, tokenizer, boundary_tokens))
        domains.append((name, "base", _held_out(name, base, base_store)))
    identity = {
        "model": replacement.identity if replacement else model.identity(),
        "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer.backend_tokenizer.to_str().encode()),
        "data": _data_identity(store, source),
        "global_batch": MicroBatching.from_config(config).total * devices,
        **_config_identity(config),
    }
    notices = ([replacement.notice] if replacement else []) + _not_scored_notices(
        source, held_out, len(configured) - len(bases)
    )
    return Prepared(
        model,
        tokenizer,
        train,
        domains,
        identity,
        boundary_tokens,
        notices,
        base_gone=replacement is not None,
    )


def tokenized(source: Source, tokenizer: Any, boundary_tokens: Boundaries) -> TokenStore:
    """Return the documents of ``source`` as tokens. Text that is in the cache is not tokenized again."""
    from pretrain.data.tokenization.tokenize import prepare as tokenize

    content = tokenizer.backend_tokenizer.to_str()
    return tokenize(source, tokenizer_json=content, eot=boundary_tokens.separator, bos=boundary_tokens.bos)


def _data_identity(store: TokenStore, source: Source) -> str:
    """Return the digest of the tokens and of what selects and masks them."""
    content = [[part.path.name for part in store.parts], view_options(source), source.document_mask]
    return xxhash.xxh3_64_hexdigest(repr(content).encode())


def _config_identity(config: RunConfig) -> dict[str, Any]:
    """Return the part of the run's identity that the config alone determines."""
    return {
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "weights": config.precision.weights,
        "optimizer": config.optimizer_identity,
        "transforms": config.transforms_identity,
    }


def domain_boundaries(domain: Source, tokenizer: Any, boundary_tokens: Boundaries) -> Boundaries:
    """Return the boundary tokens of an evaluation domain: its own, or those of the run (``boundary_tokens``) by default.

    Raises ``UserError`` for a token that the tokenizer does not have.
    """
    from pretrain.models.tokenizer import boundaries

    bos = boundary_tokens.bos is not None if domain.bos == "auto" else domain.bos
    separator = boundary_tokens.separator if domain.separator == "auto" else domain.separator
    return boundaries(tokenizer, bos=bos, separator=separator)


def _not_scored_notices(source: Source, held_out: TokenView, left_out: int) -> list[str]:
    """Return notices about domains that are not scored, or not scored a second time."""
    notices = []
    if held_out.num_tokens <= 1 and source.held_out > 0:
        notices.append(f"dataset {source.domain!r} is a single document: none is held out, so it is not scored")
    if left_out:
        notices.append(
            f"evaluation.domains: {source.domain!r} is also the training data; it is scored once, as new domain"
        )
    return notices


def _held_out(name: str, base: Source, store: TokenStore) -> TokenView:
    """Return the held-out documents of a base domain. Raises ``UserError`` where there are none to score."""
    held_out = views(store, base)[1]
    if held_out.num_tokens > 1:
        return held_out
    why = "held_out=0" if base.held_out == 0 else "it is a single document; give it at least two"
    raise UserError(f"evaluation.domains: none of the text of {name!r} is held out, so it can't be scored: {why}")


def views(store: TokenStore, source: Source) -> tuple[TokenView, TokenView]:
    """Return the training and the held-out documents."""
    return store.views(**view_options(source))


def total_steps(config: RunConfig, prepared: Prepared) -> int:
    """Return the optimizer steps: ``max_steps``, or the complete global batches in ``number_epochs`` of training tokens.

    Raises ``UserError`` when the text does not fill one global batch.
    """
    from pretrain.data.loader import check_enough

    check_enough(prepared.train, sequence_length=config.sequence_length, global_batch=prepared.global_batch)
    return config.max_steps or max(1, int(prepared.sequences * config.number_epochs / prepared.global_batch))
