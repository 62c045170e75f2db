"""The share of each part of the training data in the target tokens, from the weights, the sizes of the parts, and the replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pretrain.data.replay import Phase
from pretrain.data.sources.base import Dataset
from pretrain.data.sources.mixture import Mixture
from pretrain.data.training_data import MixturePhase, Part


def mixture_phases(
    dataset: Dataset, parts: Sequence[Part], replay_share: float, phases: Sequence[Phase]
) -> tuple[MixturePhase, ...]:
    """Return the shares of ``parts`` from the start of the run and from each of ``phases`` on."""
    sizes = {part.name: part.view.num_tokens for part in parts if not part.replay}
    replayed = proportional({part.name: part.view.num_tokens for part in parts if part.replay})
    weights = dict(dataset.weights) if isinstance(dataset, Mixture) else {}
    found = []
    for phase in (Phase(0.0), *phases):
        if phase.weights and isinstance(dataset, Mixture):
            weights = dict.fromkeys(dataset.parts, 0.0) | dict(phase.weights)
        replay_share = replay_share if phase.replay_share is None else phase.replay_share
        shares = {name: share * (1 - replay_share) for name, share in new_shares(dataset, sizes, weights).items()}
        shares |= {name: share * replay_share for name, share in replayed.items()}
        found.append(MixturePhase(phase.start, tuple(shares[part.name] for part in parts)))
    return tuple(found)


def new_shares(dataset: Dataset, sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each source of ``dataset``.

    Args:
        dataset: a source, or a mixture, whose parts may be mixtures.
        sizes: the training tokens of each source.
        weights: the weights of the parts; empty: in proportion to their sizes.
    """
    if not isinstance(dataset, Mixture):
        return dict.fromkeys(dataset.sources(), 1.0)
    inner = {name: _inner_shares(name, part, sizes) for name, part in dataset.parts.items()}
    tokens = {name: sum(sizes[source] for source in inner[name]) for name in inner}
    outer = proportional(weights or {name: size ** (1 / dataset.temperature) for name, size in tokens.items()})
    return {source: outer[name] * share for name in inner for source, share in inner[name].items()}


def _inner_shares(name: str, part: Dataset, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the share of each source of a part in this part, by the name of the source in the outer mixture."""
    names = dict(zip(part.sources(), part.under(name), strict=True))  # its own → those in the outer mixture
    weights = part.weights if isinstance(part, Mixture) else {}
    own = new_shares(part, {key: sizes[outer] for key, outer in names.items()}, weights)
    return {outer: own[key] for key, outer in names.items()}


def proportional(weights: Mapping[str, float]) -> dict[str, float]:
    """Return ``weights`` divided by their sum; all 0 where that is 0."""
    total = sum(weights.values()) or 1
    return {name: weight / total for name, weight in weights.items()}
