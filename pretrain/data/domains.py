"""The evaluation domains of a configuration, and the name under which each is shown.

A base domain is identified by its key under `evaluation.domains`. Its display name comes from the configuration or from the
path of its text, and several domains may have the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pretrain.data.sources.base import Dataset, Source

Role = Literal["new", "base"]


@dataclass(frozen=True)
class EvaluationDomain:
    """Text whose held-out documents are scored.

    Attributes:
        name: name in the metrics, unique in a run.
        role: whether the run learns it (new) or may forget it (base).
        source: the source of its documents.
        part: the part of the training data that it is; ``None`` for text that is not trained on.
    """

    name: str
    role: Role
    source: Source
    part: str | None = None


def evaluation_domains(
    dataset: Dataset, bases: Mapping[str, Source], replay: Source | None = None
) -> list[EvaluationDomain]:
    """Return the domains of a run: the parts of its training data, then the base domains, then the text that is replayed.

    ``bases`` maps keys to sources. Text that occurs several times is scored once. A part of a mixture that is also a base
    domain is scored as base domain; a dataset that is also a base domain is the new domain.
    """
    parts = dataset.sources()
    is_mixture = parts.get(dataset.domain) is not dataset
    if not is_mixture:
        bases = {key: base for key, base in bases.items() if not is_same_domain(base, parts[dataset.domain])}
    if replay is not None and not any(_is_same_text(replay, base) for base in bases.values()):
        key = "replay"
        while key in bases:
            key += "+"
        bases = {**bases, key: replay}
    parts = {
        name: source
        for name, source in parts.items()
        if not (is_mixture and any(_is_same_text(source, base) for base in bases.values()))
    }
    found = [EvaluationDomain(name, _role(source, "new"), source, name) for name, source in parts.items()]
    return found + [
        EvaluationDomain(name, _role(source, "base"), source) for name, source in base_domains(bases, parts).items()
    ]


def base_domains(bases: Mapping[str, Source], taken: Collection[str]) -> dict[str, Source]:
    """Return display name → source of the sources ``bases``, which have keys. The names are unique and not in ``taken``."""
    names = {key: source.domain for key, source in bases.items()}
    while shared := _shared(names, taken):
        names |= {key: f"{key}/{names[key]}" for key in shared}
    return {names[key]: source for key, source in bases.items()}


def _role(source: Source, default: Role) -> Role:
    return default if source.role == "auto" else source.role


def is_same_domain(one: Source, other: Source) -> bool:
    """Return whether both sources have the same name and hold out the same documents of the same text."""
    return one.domain == other.domain and _is_same_text(one, other)


def _is_same_text(one: Source, other: Source) -> bool:
    """Return whether both sources hold out the same documents of the same text."""
    return _what_is_scored(one) == _what_is_scored(other)


def view_options(source: Source) -> dict[str, Any]:
    """Return the keyword arguments of `TokenStore.views`, which select the training and the held-out documents of a source."""
    return {
        "held_out": source.held_out,
        "train_data_ratio": source.train_data_ratio,
        "deduplicate": _deduplicate(source),
    }


def _deduplicate(source: Source) -> bool | str:
    """Return the value of ``deduplicate``; ``True`` for ``exact``, which means the same."""
    return source.deduplicate == "exact" or source.deduplicate


def _what_is_scored(source: Source) -> list[Any]:
    """Return the values that determine which documents are held out and how their text is read."""
    return [source.identity(), source.options(), source.held_out, _deduplicate(source), source.max_tokens]


def _shared(names: Mapping[str, str], taken: Collection[str]) -> list[str]:
    """Return the keys whose name another key has too, or that is ``taken``."""
    count = Counter([*taken, *names.values()])
    return [key for key, name in names.items() if count[name] > 1]
