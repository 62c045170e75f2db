"""The evaluation domains of a configuration, and the name under which each is shown.

A base domain is identified by its key under `evaluation.domains`. Its display name comes from the configuration or from the
path of its text, and several domains may have the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.data.sources.base import Source


def base_domains(dataset: Source, bases: Mapping[str, Source]) -> dict[str, Source]:
    """Return display name → source of every base domain that is scored, in the order of the configuration. The names are unique
    and differ from ``dataset.domain``, the name of ``dataset``.

    ``bases`` maps keys to sources. A source with the name, the text and the options of ``dataset`` is the new domain itself and
    is left out.
    """
    scored = {key: source for key, source in bases.items() if not is_same_domain(source, dataset)}
    names = {key: source.domain for key, source in scored.items()}
    while shared := _shared(names, dataset.domain):
        names |= {key: f"{key}/{names[key]}" for key in shared}
    return {names[key]: source for key, source in scored.items()}


def is_same_domain(one: Source, other: Source) -> bool:
    """Return whether both sources have the same name and hold out the same documents of the same text."""
    return one.domain == other.domain and _what_is_scored(one) == _what_is_scored(other)


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
    return [source.identity(), source.options(), source.held_out, _deduplicate(source)]


def _shared(names: Mapping[str, str], new: str) -> list[str]:
    """Return the keys of the base domains whose name another domain has too."""
    count = Counter([new, *names.values()])
    return [key for key, name in names.items() if count[name] > 1]
