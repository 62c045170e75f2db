"""The config of replay and phases: how much old text is mixed into the training data, and what changes during the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from pretrain.config.check import check_value
from pretrain.data.sources.base import Dataset, Source
from pretrain.data.sources.mixture import Mixture, Share, check_weights
from pretrain.runtime.errors import UserError, did_you_mean

ReplayShare = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class ReplayConfig:
    """How much of the training tokens is old text, which the model should not forget.

    Attributes:
        share: Share of the training tokens that is old text, from 0 to below 1.
        source: The old text: dataset@replay.source=local replay.source.nameOrPath=...; null: the training documents of
            evaluation.domains.
    """

    share: ReplayShare = 0.0
    source: Source | None = None


PHASE_KEYS: dict[str, Any] = {  # the keys of an item of `phases`, with their types
    "from": Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)],
    "weights": dict[str, Share] | None,
    "replay_share": ReplayShare | None,
}


@dataclass(frozen=True)
class Phase:
    """Another mixture from a share of the run on.

    Attributes:
        start: share of the run's steps at which the phase begins; ``from`` in the config.
        weights: share of the target tokens by part, as in ``dataset.weights``, a part that is left out has none; empty: as
            before the phase.
        replay_share: share of replayed tokens; ``None``: as before the phase.
    """

    start: float
    weights: Mapping[str, float] = field(default_factory=dict)
    replay_share: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Phase:
        """Return the phase that a checked item of the key ``phases`` describes."""
        return cls(given["from"], dict(given.get("weights") or {}), given.get("replay_share"))


def check_training_data(
    dataset: Dataset, replay: ReplayConfig, phases: Sequence[Mapping[str, Any]], domains: Mapping[str, Source]
) -> None:
    """Check the weights, the phases and the replay of a run against each other.

    Args:
        dataset: the new text.
        replay: the old text and its share.
        phases: the items of the key ``phases`` as given.
        domains: the domains of ``evaluation.domains``.

    Raises:
        UserError: a mistake in one of them.
    """
    dataset.check_for_training("dataset")
    shares = {"replay.share": replay.share}
    previous = 0.0
    for i, given in enumerate(phases):
        path = f"phases[{i}]"
        phase = _checked_phase(path, given, dataset)
        if phase.start <= previous:
            raise UserError(f"{path}.from={phase.start}: must be greater than the {previous} of the phase before it")
        previous = phase.start
        shares[f"{path}.replay_share"] = phase.replay_share or 0.0
    replayed = next((f"{path}={share}" for path, share in shares.items() if share), None)
    if replayed is not None:
        _check_old_text(replayed, replay.source, domains)


def _checked_phase(path: str, given: Mapping[str, Any], dataset: Dataset) -> Phase:
    for key, value in given.items():
        if key not in PHASE_KEYS:
            raise UserError(f"{path}: a phase has no {key!r}{did_you_mean(str(key), PHASE_KEYS)}")
        check_value(f"{path}.{key}", value, PHASE_KEYS[key])
    if "from" not in given:
        raise UserError(f"{path}.from is missing: the share of the run's steps at which the phase begins")
    phase = Phase.of(given)
    if not phase.weights and phase.replay_share is None:
        raise UserError(f"{path}: a phase needs weights or replay_share, or both")
    if phase.weights and not isinstance(dataset, Mixture):
        raise UserError(f"{path}.weights: only a mixture has weights: dataset=mixture")
    if phase.weights and isinstance(dataset, Mixture):
        check_weights(f"{path}.weights", phase.weights, dataset.parts)
    return phase


def _check_old_text(replayed: str, source: Source | None, domains: Mapping[str, Source]) -> None:
    """Raise ``UserError`` where there are no documents that could be replayed. ``replayed`` is the setting that needs them."""
    if source is not None:
        source.check_for_training("replay.source")
        return
    old = {key: domain for key, domain in domains.items() if domain.role != "new"}
    if not old:
        raise UserError(
            f"{replayed}: there is no old text; name it with dataset@replay.source=..., or as a domain of evaluation.domains"
        )
    if all(domain.held_out == 1 for domain in old.values()):
        raise UserError(
            f"{replayed}: evaluation.domains.{next(iter(old))} holds out all its documents (held_out=1), so that none is left "
            "to replay; name the old text with dataset@replay.source=..."
        )
