"""What exists before the first process trains: the model's folder looked at, its tokenizer, and all text as tokens."""

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
    from pretrain.run.missing_model import Remains


def model_spec(config: RunConfig) -> Any:
    """The model that the config names; a run's or a checkpoint's weights where it names one of these.

    Raises ``UserError`` for a checkpoint that is not whole.
    """
    from pretrain.checkpoint.weights import weights_folder

    spec, verify = config.model, config.checkpoint.verify
    folder = weights_folder(spec.name_or_path, key="model_name", verify=verify)
    tokenizer = spec.tokenizer_name and weights_folder(spec.tokenizer_name, key="model.tokenizer_name", verify=verify)
    return replace(spec, name_or_path=folder, tokenizer_name=tokenizer)


def _checked_model(config: RunConfig) -> tuple[Any, Remains | None]:
    """The model that the config names, checked; where it is gone, that of the checkpoint from which the run continues.

    Raises ``UserError`` where neither can be used.
    """
    from pretrain.run.missing_model import remains_of

    length = config.sequence_length
    try:
        model = model_spec(config)
        model.check(length)
        return model, None
    except UserError:
        found = remains_of(config)
        if found is None:
            raise
    model = found.in_place_of(config.model)
    model.check(length)
    return model, found


@dataclass(frozen=True)
class Prepared:
    """What exists before the first process trains. ``domains``: name, role and held-out documents of each domain.
    ``global_batch``: sequences of all devices and micro-batches in one step. ``boundaries``: the tokens around documents.
    ``notices``: what to say of model and domains, once a run. ``base_gone``: ``model`` is what a checkpoint of the run holds,
    for the model with which it began is no longer there."""

    model: Any
    tokenizer: Any
    train: TokenView
    domains: list[tuple[str, str, TokenView]]
    identity: dict[str, Any]
    global_batch: int
    boundaries: Boundaries
    notices: Sequence[str] = ()
    base_gone: bool = False


def prepare(config: RunConfig, *, devices: int = 1) -> Prepared:
    """Check the model's folder, get its tokenizer, and tokenize whatever the cache does not hold yet. ``devices``: of
    all processes, each with ``batch_size`` sequences at a time.

    Raises ``UserError`` for a model or data that can't be used.
    """
    from pretrain.data.tokenization.tokenize import prepare as tokenize
    from pretrain.data.tokenization.tokenize import training_texts
    from pretrain.models.tokenizer import boundaries

    model, gone = _checked_model(config)
    source = config.dataset
    tokenizer = model.tokenizer(partial(training_texts, source))
    around = boundaries(tokenizer, bos=source.bos, separator=source.separator)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()

    def encode(source: Source, around: Boundaries) -> TokenStore:
        return tokenize(source, tokenizer_json=tokenizer_json, eot=around.separator, bos=around.bos)

    store = encode(source, around)
    train, held_out = views(store, source)
    domains = [(source.domain, "new", held_out)] if held_out.num_tokens > 1 else []
    configured = config.evaluation.domains
    bases = base_domains(source, configured)
    for name, base in bases.items():
        tokenized = encode(base, of_domain(base, tokenizer, around))
        domains.append((name, "base", _held_out(name, base, tokenized)))
    global_batch = MicroBatching.from_config(config).total * devices
    identity = {
        "model": gone.identity if gone else model.identity(),
        "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer_json.encode()),
        "data": xxhash.xxh3_64_hexdigest(
            repr([[part.path.name for part in store.parts], view_options(source), source.document_mask]).encode()
        ),
        "sequence_length": config.sequence_length,
        "global_batch": global_batch,
        "seed": config.seed,
        "weights": config.precision.weights,
        "optimizer": config.optimizer_identity,
    }
    notices = ([gone.notice] if gone else []) + _not_scored(source, held_out, len(configured) - len(bases))
    return Prepared(
        model, tokenizer, train, domains, identity, global_batch, around, notices, base_gone=gone is not None
    )


def of_domain(domain: Source, tokenizer: Any, around: Boundaries) -> Boundaries:
    """The tokens around the documents of an evaluation domain: those of the run, ``around``, where it names no others.

    Raises ``UserError`` for a token that the tokenizer does not have.
    """
    from pretrain.models.tokenizer import boundaries

    bos = around.bos is not None if domain.bos == "auto" else domain.bos
    separator = around.separator if domain.separator == "auto" else domain.separator
    return boundaries(tokenizer, bos=bos, separator=separator)


def _not_scored(source: Source, held_out: TokenView, left_out: int) -> list[str]:
    """What a person who expects every domain to be scored has to know."""
    notices = []
    if held_out.num_tokens <= 1 and source.held_out > 0:
        notices.append(f"dataset {source.domain!r} is a single document: none is held out, so it is not scored")
    if left_out:
        notices.append(
            f"evaluation.domains: {source.domain!r} is also the training data; it is scored once, as new domain"
        )
    return notices


def _held_out(name: str, base: Source, tokenized: TokenStore) -> TokenView:
    """The held-out documents of a base domain. Raises ``UserError`` where there are none: nothing could be scored."""
    held_out = views(tokenized, base)[1]
    if held_out.num_tokens > 1:
        return held_out
    why = "held_out=0" if base.held_out == 0 else "it is a single document; give it at least two"
    raise UserError(f"evaluation.domains: none of the text of {name!r} is held out, so it can't be scored: {why}")


def views(store: TokenStore, source: Source) -> tuple[TokenView, TokenView]:
    """The training and the held-out documents."""
    return store.views(**view_options(source))


def total_steps(config: RunConfig, prepared: Prepared) -> int:
    """``max_steps``, or as many whole global batches as ``number_epochs`` passes over the training tokens hold.

    Raises ``UserError`` when the text does not fill one global batch.
    """
    from pretrain.data.loader import check_enough

    sequences = (prepared.train.num_tokens - 1) // config.sequence_length
    check_enough(prepared.train, sequence_length=config.sequence_length, global_batch=prepared.global_batch)
    return config.max_steps or max(1, int(sequences * config.number_epochs / prepared.global_batch))
