"""Prepare the text of a run: tokenize every source, and say which documents are trained on, replayed and scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import mul
from typing import TYPE_CHECKING, Any

import xxhash

from pretrain.data.domains import evaluation_domains, view_options
from pretrain.data.fim import fill_in_middle
from pretrain.data.shares import mixture_phases
from pretrain.data.sources.mixture import REPLAY, Mixture, by_source
from pretrain.data.training_data import Part, TrainingData, check_enough, check_epochs
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.data.sources.base import Dataset, Source
    from pretrain.data.store.token_store import TokenStore, TokenView
    from pretrain.models.tokenizer import Boundaries
    from pretrain.run.prepare import Prepared

ScoredDomain = tuple[str, str, "TokenView"]  # name, role and held-out documents


@dataclass(frozen=True)
class TokenizedSources:
    """The sources of a run as tokens of its tokenizer; each is tokenized once.

    ``places`` maps the id of a source to its key in the config, for messages.
    """

    tokenizer: Any
    boundaries: Boundaries
    places: Mapping[int, str] = field(default_factory=dict)
    _stores: dict[int, tuple[Source, TokenStore]] = field(default_factory=dict)  # id of the source → it and its tokens

    def store(self, source: Source) -> TokenStore:
        """Return all documents of ``source``."""
        if id(source) not in self._stores:
            with _named(self.places.get(id(source), "dataset")):
                own = domain_boundaries(source, self.tokenizer, self.boundaries)
                self._stores[id(source)] = source, tokenized(source, self.tokenizer, own)
        return self._stores[id(source)][1]

    def views(self, source: Source) -> tuple[TokenView, TokenView]:
        """Return the training and the held-out documents of ``source``."""
        return views(self.store(source), source)


def places_of(config: RunConfig) -> dict[int, str]:
    """Return the key in the config of each dataset, such as ``dataset.parts.es``, by the id of the dataset."""
    found: dict[int, str] = {}

    def add(dataset: Dataset | None, place: str) -> None:
        found[id(dataset)] = place
        for name, part in dataset.parts.items() if isinstance(dataset, Mixture) else ():
            add(part, f"{place}.parts.{name}")

    add(config.dataset, "dataset")
    add(config.replay.source, "replay.source")
    for name, domain in config.evaluation.domains.items():
        add(domain, f"evaluation.domains.{name}")
    return found


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Put ``place`` in front of the key in messages about a dataset, which name keys as those of ``dataset``."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if place == "dataset" or not message.startswith("dataset."):
            raise
        raise UserError(place + message.removeprefix("dataset")) from error


def training_data(config: RunConfig, texts: TokenizedSources) -> tuple[TrainingData, str]:
    """Return the training documents of the run by part, and a digest of what determines them."""
    dataset = config.dataset
    for source in dataset.sources().values():  # before the domains are compared, so that a mistake names its part
        texts.store(source)
    replay = _replayed(config)
    # sorted, so that the order of the words of a command line does not matter
    sources = dict(sorted(dataset.sources().items())) | replay
    parts, contents = [], []
    caps, weights = by_source(dataset, "max_epochs", min), by_source(dataset, "loss_weights", mul)
    for name, source in sources.items():
        view, weight = texts.views(source)[0], weights.get(name, 1.0)
        with _named(texts.places.get(id(source), "dataset")):
            vocabulary = texts.tokenizer.get_vocab() if source.fim_rate else {}
            fim = fill_in_middle(source.fim_rate, source.fim_spm_rate, vocabulary)
        near = source.deduplicate == "near"
        parts.append(Part(name, view, name in replay, weight, caps.get(name), source.packing, fim, near))
        contents.append(_content(texts.store(source), source, mask=dataset.document_mask, loss_weight=weight))
    content: list[Any]
    content = contents[0] if len(contents) == 1 else [[name, c] for name, c in zip(sources, contents, strict=True)]
    phases = mixture_phases(dataset, parts, config.replay.share, config.training_phases)
    data = TrainingData(tuple(parts), phases)
    return data, xxhash.xxh3_64_hexdigest(repr(content).encode())


def _replayed(config: RunConfig) -> dict[str, Source]:
    """Return the sources of old text by the name of their part; none if nothing is replayed.

    Raises ``UserError`` where there is no old text.
    """
    shares = [config.replay.share, *(phase.replay_share or 0.0 for phase in config.training_phases)]
    if not any(shares):
        return {}
    if config.replay.source is not None:
        return {REPLAY: config.replay.source}
    bases = [
        d for d in evaluation_domains(config.dataset, config.evaluation.domains) if d.role == "base" and not d.part
    ]
    if not bases:
        raise UserError(
            f"replay.share={max(shares)}: there is no old text; name it with dataset@replay.source=..., or as a domain of "
            "evaluation.domains"
        )
    return {REPLAY: bases[0].source} if len(bases) == 1 else {f"{REPLAY}/{d.name}": d.source for d in bases}


def scored_domains(config: RunConfig, texts: TokenizedSources) -> tuple[list[ScoredDomain], list[str]]:
    """Return name, role and held-out documents of each evaluation domain, and notices about those that are not scored.

    Raises ``UserError`` for a base domain without held-out documents.
    """
    domains: list[ScoredDomain] = []
    notices = []
    wanted = evaluation_domains(config.dataset, config.evaluation.domains, config.replay.source)
    for domain in wanted:
        held_out = texts.views(domain.source)[1]
        if held_out.num_tokens > 1:
            domains.append((domain.name, domain.role, held_out))
        elif domain.part is None and domain.source is not config.replay.source:
            why = "held_out=0" if domain.source.held_out == 0 else "it is a single document; give it at least two"
            raise UserError(
                f"evaluation.domains: none of the text of {domain.name!r} is held out, so it can't be scored: {why}"
            )
        elif domain.source.held_out > 0:
            notices.append(f"dataset {domain.name!r} is a single document: none is held out, so it is not scored")
    if len(config.dataset.sources()) == 1 and len(config.evaluation.domains) > sum(d.part is None for d in wanted):
        notices.append(
            f"evaluation.domains: {config.dataset.domain!r} is also the training data; it is scored once, as new domain"
        )
    return domains, notices


def removed_documents(dataset: Dataset, texts: TokenizedSources) -> list[str]:
    """Return a line for each source of which ``where`` or ``deduplicate`` removed documents, with the counts."""
    from pretrain.data.store.document_counts import DocumentCounts

    chosen = {name: source for name, source in dataset.sources().items() if source.where or source.deduplicate}
    lines = {name: DocumentCounts.of(*texts.views(source)).described() for name, source in chosen.items()}
    return [f"dataset {name!r}: {line}" for name, line in lines.items() if line]


def total_steps(config: RunConfig, train: TrainingData, global_batch: int) -> int:
    """Return the optimizer steps: ``max_steps``, or the complete global batches in ``number_epochs`` of training tokens.

    Raises ``UserError`` when the text does not fill one global batch, or a part would be read too often.
    """
    batch = {"sequence_length": config.sequence_length, "global_batch": global_batch}
    check_enough(train, **batch)
    samples = train.epoch_samples(config.sequence_length) * config.number_epochs
    steps = config.max_steps or max(1, int(samples / global_batch))
    check_epochs(train, steps=steps, document_mask=config.dataset.document_mask, **batch)
    return steps


def lines_before_the_start(config: RunConfig, prepared: Prepared) -> list[str]:
    """Return what is printed about the training data before a run starts: the table of the parts, warnings, padding."""
    from pretrain.data.planned import padding, planned_parts, table_and_warnings

    planned = planned_parts(
        prepared.train,
        steps=prepared.total_steps,
        global_batch=prepared.global_batch,
        sequence_length=config.sequence_length,
        document_mask=config.dataset.document_mask,
    )
    lines = table_and_warnings(planned, prepared.train, steps=prepared.total_steps)
    return [*padding(prepared.train, config.sequence_length), *lines]


def tokenized(source: Source, tokenizer: Any, boundary_tokens: Boundaries) -> TokenStore:
    """Return the documents of ``source`` as tokens. Text that is in the cache is not tokenized again."""
    from pretrain.data.tokenization.tokenize import prepare as tokenize

    content = tokenizer.backend_tokenizer.to_str()
    return tokenize(source, tokenizer_json=content, eot=boundary_tokens.separator, bos=boundary_tokens.bos)


def _content(store: TokenStore, source: Source, *, mask: bool, loss_weight: float) -> list[Any]:
    """Return what determines the tokens of a part of the training data, and what is selected, masked and weighted of them."""
    changed: list[str] = [] if source.packing == "stream" else [source.packing]
    changed += [f"fim {source.fim_rate} {source.fim_spm_rate}"] if source.fim_rate else []
    changed += [f"loss {loss_weight}"] if loss_weight != 1 else []
    return [[part.path.name for part in store.parts], view_options(source), mask, *changed]


def domain_boundaries(domain: Source, tokenizer: Any, boundary_tokens: Boundaries) -> Boundaries:
    """Return the boundary tokens of an evaluation domain: its own, or those of the run (``boundary_tokens``) by default.

    Raises ``UserError`` for a token that the tokenizer does not have.
    """
    from pretrain.models.tokenizer import boundaries

    bos = boundary_tokens.bos is not None if domain.bos == "auto" else domain.bos
    separator = boundary_tokens.separator if domain.separator == "auto" else domain.separator
    return boundaries(tokenizer, bos=bos, separator=separator)


def views(store: TokenStore, source: Source) -> tuple[TokenView, TokenView]:
    """Return the training and the held-out documents."""
    return store.views(**view_options(source))
