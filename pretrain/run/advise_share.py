"""The replay share of `task=advise`: two probes, the models between them, and true runs that check what is expected of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from pretrain.advise import share
from pretrain.advise.budget import POINTS
from pretrain.advise.found import checks_of, missed, rms
from pretrain.run.advise_scores import losses_of

if TYPE_CHECKING:
    from pretrain.advise.probes import Measured, Probe
    from pretrain.run.advising import Advising

MIN_PRIOR, DEFAULT_PRIOR = 0.02, 0.1  # replay share that is assumed before anything is measured


def choose_share(advising: Advising, probes: Sequence[Probe]) -> None:
    """Choose the share from two probes and the models between them."""
    found, asked = advising.found, advising.asked
    runs = [run for run in map(advising.attempt, probes) if run is not None and not run.diverged]
    if len(runs) < len(probes):
        found.notes.append("A probe of the replay share failed or diverged, so the share was not chosen.")
        return
    many_replay, little_replay = sorted(runs, key=lambda run: -(run.probe.share or 0.0))
    shares = [share.PROBED[0] + (share.PROBED[1] - share.PROBED[0]) * i / (POINTS - 1) for i in range(POINTS)]
    scores = advising.between(
        advising.weights_of(many_replay), little_replay, [i / (POINTS - 1) for i in range(POINTS)]
    )
    prior = asked.prior_share or advising.config.replay.share or DEFAULT_PRIOR
    advising.share_of = partial(
        share.choose,
        [round(x, 6) for x in shares],
        losses_of(scores),
        {name: one.loss for name, one in advising.base.items()},
        {name: one.role for name, one in advising.base.items()},
        prior_replay=min(max(prior, MIN_PRIOR), 1 - MIN_PRIOR),
        penalty=asked.penalty,
        max_forgetting=asked.max_forgetting,
    )
    found.share = chosen = advising.share_of()
    found.replay = round(chosen.replay, 2)
    nearest = min(range(POINTS), key=lambda i: abs(shares[i] - (1 - chosen.replay)))
    found.errors |= advising.errors_of(scores[nearest])


def check_share(advising: Advising) -> None:
    """Compare what the mixture law says of two shares with true runs at them: its intervals hold what it misses, and more old
    text is taken where too much is forgotten."""
    chosen, found = advising.found.share, advising.found
    if chosen is None or found.replay is None or not advising.allotment.checks:
        return
    at = _nearest_run(advising)
    if at is None or at.diverged:
        return
    middle = found.replay
    others = [r for r in (min(0.9, middle + 0.3), max(0.0, middle - 0.1)) if abs(r - middle) > 0.02]
    for other in others[: advising.allotment.checks]:
        probe = advising.full(at.probe.lr, round(other, 2), "check")
        if not advising.probes.fits(probe):
            found.notes.append(f"The budget had no room for the check of the replay share {other:.0%}.")
            break
        there = advising.attempt(probe)
        if there is not None and not there.diverged:
            found.checks += checks_of(chosen, at, there)
            _within_limit(advising, at, there)
    found.notes += missed(found.checks)
    if found.checks:
        found.share = advising.share_of(error=rms(found.checks))


def _nearest_run(advising: Advising) -> Measured | None:
    """Return the run at the chosen share whose rate is nearest to the chosen one; it is made where there is none."""
    known = [run for run in advising.rate_runs if not run.diverged]
    if known:
        return min(known, key=lambda run: abs(math.log(run.probe.lr / advising.found.lr)))
    return advising.attempt(advising.full(advising.found.lr, advising.found.replay, "check"))


def _within_limit(advising: Advising, at: Measured, there: Measured) -> None:
    """Take the replay share between two runs at which forgetting reaches the limit, if it is above it in the first alone."""
    limit = advising.asked.max_forgetting
    if limit is None or not there.forgetting <= limit < at.forgetting:
        return
    first, second = at.probe.share or 0.0, there.probe.share or 0.0
    part = (at.forgetting - limit) / (at.forgetting - there.forgetting)
    advising.found.replay = round(first + part * (second - first), 2)
    advising.found.notes.append(
        f"At {first:.0%} old text a probe forgot {at.forgetting:.3f} nats per token, at {second:.0%} {there.forgetting:.3f}; "
        f"{advising.found.replay:.0%} lies where advise.max_forgetting={limit:g} is reached."
    )
