"""Evaluation domains: which ones a configuration has, and the name under which each is shown.

A base domain is identified by its key under `evaluation.domains`. Its name, which a person reads, comes from the
configuration or from the path of its text, and several domains may have the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.data.sources.base import Source


def base_domains(dataset: Source, bases: Mapping[str, Source]) -> dict[str, Source]:
    """Shown name → source of every base domain that is scored, in their order; no two share a name with each other or
    with ``dataset``, whose own name is ``dataset.domain``.

    ``bases``: by key. One with the name, the text and the options of ``dataset`` is the new domain itself and left out.
    """
    scored = {key: source for key, source in bases.items() if not is_same_domain(source, dataset)}
    names = {key: source.domain for key, source in scored.items()}
    while shared := _shared(names, dataset.domain):
        names |= {key: f"{key}/{names[key]}" for key in shared}
    return {names[key]: source for key, source in scored.items()}


def is_same_domain(one: Source, other: Source) -> bool:
    return one.domain == other.domain and _what_is_scored(one) == _what_is_scored(other)


def view_options(source: Source) -> dict[str, Any]:
    """Which documents of a source are trained on and which are held out: the keyword arguments of `TokenStore.views`."""
    return {
        "held_out": source.held_out,
        "train_data_ratio": source.train_data_ratio,
        "deduplicate": source.deduplicate,
    }


def _what_is_scored(source: Source) -> list[Any]:
    """What decides which documents are held out, and how their text is read."""
    return [source.identity(), source.options(), source.held_out, source.deduplicate]


def _shared(names: Mapping[str, str], new: str) -> list[str]:
    """Keys of the base domains whose name another domain has too."""
    count = Counter([new, *names.values()])
    return [key for key, name in names.items() if count[name] > 1]
