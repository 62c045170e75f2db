"""From what was found to the recipe and the content of advice.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pretrain.advise.recipe import Interval, Prediction, Recipe

if TYPE_CHECKING:
    from pretrain.advise.found import Found
    from pretrain.advise.probes import Measured, Probes


SAME_SHARE = 0.005  # difference of replay shares at which the law of one holds for the other


def recipe_of(found: Found, probes: Probes, roles: dict[str, str], nearest: Measured | None) -> Recipe:
    """Return the recipe. ``nearest`` is the probe whose settings are nearest to the chosen ones."""
    keys: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    reasons = []
    if found.rate is not None:
        keys["lr"] = found.lr
        span = "" if found.rate.low == found.rate.high else f" ({found.rate.low:.2g} to {found.rate.high:.2g})"
        reasons.append(f"lr {found.lr:g}{span}: {found.rate.reason}.")
    if found.share is not None and found.replay is not None:
        keys["replay.share"] = found.replay
        low, high = min(found.share.low, found.replay), max(found.share.high, found.replay)
        reasons.append(
            f"replay.share {found.replay:g} ({low:.2f} to {high:.2f}): the smallest sum of both roles' "
            f"losses with a penalty for the distance to the prior share; {found.share.reason}."
        )
    if keys:
        keys["max_steps"] = probes.planned.steps
        reasons.append(f"max_steps {probes.planned.steps}: the length of the planned run, with other shares too.")
    if found.length is not None and found.length.enough is not None:
        reasons.append(
            f"After {found.length.enough:,} steps each further tenth of the run gains less than advise.limit; a run of that "
            "length is enough."
        )
    for mean in found.means:
        if mean["chosen"]:
            keys |= mean["keys"]
            choices |= mean["choices"]
            reasons.append(mean["reason"])
    return Recipe(keys, choices, reasons, predictions(found, roles, nearest, probes), probes.allotment.steps)


def predictions(found: Found, roles: dict[str, str], nearest: Measured | None, probes: Probes) -> dict[str, Prediction]:
    """Return what is expected of each domain: by the law of the learning curve at the planned length, else what a probe with
    the chosen settings is expected to show at its own. The law is used only if every domain has one."""
    chosen = next((mean for mean in found.means if mean["chosen"]), None)
    if chosen is not None:
        return {
            name: Prediction(roles[name], change, probes.allotment.steps, "probe")
            for name, change in chosen["changes"].items()
        }
    if nearest is None:
        return {}
    by_law = found.length is not None and roles.keys() <= found.length.changes.keys()
    if found.length is not None and by_law and abs((nearest.probe.share or 0.0) - (found.replay or 0.0)) < SAME_SHARE:
        changes = found.length.changes
        return {name: Prediction(role, changes[name][-1], probes.planned.steps, "law") for name, role in roles.items()}
    steps = probes.allotment.steps
    return {
        name: Prediction(role, _in_probe(found, name, role, nearest), steps, "probe") for name, role in roles.items()
    }


def _in_probe(found: Found, name: str, role: str, nearest: Measured) -> Interval:
    """Return the change of a domain in a probe with the chosen settings: that of the nearest probe, moved by what the choice of
    the rate expects of the role, and by what the mixture expects between the two shares."""
    xs = nearest.losses[name][1]
    by_share = _by_share(found, name, nearest)
    change, error = xs[-1] - xs[0] + by_share, 1.28 * found.errors.get(role, 0.0) + abs(by_share) / 2
    if found.rate is None:
        return change, change - error, change + error
    value, low, high = found.rate.gain if role == "new" else found.rate.forgetting
    sign = -1 if role == "new" else 1
    moved = change + sign * value - (nearest.change(role) or 0.0)
    wider = abs(by_share) / 2
    ends = sorted((moved + sign * (low - value), moved + sign * (high - value)))
    ends = [ends[0] - wider, ends[1] + wider]
    return moved, min(ends[0], moved - error), max(ends[1], moved + error)


def _by_share(found: Found, name: str, nearest: Measured) -> float:
    if found.share is None or found.replay is None or abs(found.replay - (nearest.probe.share or 0.0)) < SAME_SHARE:
        return 0.0
    chosen, measured = (found.share.expected(replay)[name] for replay in (found.replay, nearest.probe.share or 0.0))
    return chosen - measured


def record(found: Found, probes: Probes, recipe: Recipe, command: str) -> dict[str, Any]:
    """Return the content of advice.json."""
    planned = probes.planned
    return {
        "overrides": recipe.words,
        "command": command,
        "sentence": recipe.sentence(),
        "reasons": recipe.reasons,
        "predicted": {
            name: {"role": one.role, "change": one.change[0], "low": one.change[1], "high": one.change[2]}
            | {"steps": one.steps, "by": one.by}
            for name, one in recipe.predicted.items()
        },
        "planned": asdict(planned),
        "budget": {"share": probes.allotment.budget / planned.cost, "spent": probes.spent / planned.cost}
        | {"allotment": asdict(probes.allotment)},
        "look": None if found.look is None else asdict(found.look),
        "rate": None if found.rate is None else asdict(found.rate),
        "share": None if found.share is None else found.share.record(),
        "checks": found.checks,
        "length": None if found.length is None else found.length.record(),
        "batch": found.batch,
        "means": found.means,
        "errors": found.errors,
        "notes": found.notes,
        "probes": [one.row(planned) for one in probes.measured.values()],
    }
