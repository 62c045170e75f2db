"""The steps of `task=advise` behind learning rate and share: means against forgetting, and the batch of several devices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pretrain.advise import share
from pretrain.advise.budget import FORWARD, LORA, MIN_STEPS
from pretrain.advise.probes import Measured, Probe

if TYPE_CHECKING:
    from pretrain.run.advise_scores import Scores
    from pretrain.run.advising import Advising

MERGED = (0.75, 0.5, 0.25)  # shares of the result in the merges that are scored
KL_WEIGHT = 0.5
BATCHES = (2, 4)  # times the global batch


def try_means(advising: Advising) -> list[dict[str, Any]]:
    """Try LoRA, a merge with the base model and a KL term, in this order, until one keeps forgetting within the limit. Nothing is
    tried where the best share does so already."""
    limit, at = advising.asked.max_forgetting, advising.nearest()
    if limit is None or at is None or at.forgetting <= limit:
        return []
    tried: list[dict[str, Any]] = []
    for name, attempt in (("LoRA", _lora), ("a merge with the base model", _merged), ("a KL term", _kl)):
        result = attempt(advising, at, limit)
        if result is None:
            advising.found.notes.append(
                f"Against forgetting, {name} was not tried: no room in the budget, not possible, or it failed."
            )
            continue
        tried.append(result)
        if result["forgetting"] <= limit and result["gain"] > 0:
            result["chosen"] = True
            return tried
    advising.found.notes.append(
        f"Nothing that was tried keeps forgetting within advise.max_forgetting={limit:g} and still gains."
    )
    return tried


def _lora(advising: Advising, at: Measured, limit: float) -> dict[str, Any] | None:
    lr = float(f"{share.LORA_LR * advising.found.lr:.3g}")
    probe = replace(at.probe, kind="means", lr=lr, trained=LORA, more=("transform=[lora]", *at.probe.more))
    if not advising.can_add_lora or not advising.probes.fits(probe):
        return None
    found = _run(advising, replace(probe, keeps_model=False), "LoRA")
    return found and found | {"keys": {"lr": lr}, "choices": {"transform": ["lora"]}}


def _kl(advising: Advising, at: Measured, limit: float) -> dict[str, Any] | None:
    more = ("objective=kl_to_base", f"objective.weight={KL_WEIGHT:g}", *at.probe.more)
    probe = replace(at.probe, kind="means", trained=at.probe.trained + FORWARD, more=more, keeps_model=False)
    if advising.config.objective_identity is not None or not advising.probes.fits(probe):
        return None
    found = _run(advising, probe, f"kl_to_base, weight {KL_WEIGHT:g}")
    return found and found | {"keys": {"objective.weight": KL_WEIGHT}, "choices": {"objective": "kl_to_base"}}


def _run(advising: Advising, probe: Probe, name: str) -> dict[str, Any] | None:
    run = advising.attempt(probe)
    if run is None:
        return None
    errors = advising.found.errors
    changes = {}
    for domain, (_, ys) in run.losses.items():
        change, error = ys[-1] - ys[0], 1.28 * errors.get(run.roles[domain], 0.0)
        changes[domain] = (change, change - error, change + error)
    gain, forgetting = (-math.inf, math.inf) if run.diverged else (run.gain, run.forgetting)
    return _result(name, gain, forgetting, changes)


def _result(name: str, gain: float, forgetting: float, changes: dict[str, Any]) -> dict[str, Any]:
    reason = f"{name}: a probe with it gained {gain:.3f} and forgot {forgetting:.3f} nats per token."
    return {"name": name, "gain": gain, "forgetting": forgetting, "changes": changes, "chosen": False, "reason": reason}


def _merged(advising: Advising, at: Measured, limit: float) -> dict[str, Any] | None:
    cost = FORWARD * len(MERGED) * sum(scores.tokens for scores in advising.base.values())
    room = advising.probes.allotment.budget - advising.probes.spent
    if (
        not (at.folder / "model").is_dir()
        or cost > room
        or advising.config.transforms
        or not advising.base_is_readable(at)
    ):
        return None
    points = advising.between(advising.base_files(), at, MERGED)
    changes = [{name: _change(advising, name, one) for name, one in scores.items()} for scores in points]
    means = [{role: _mean(advising, found, role) for role in ("new", "base")} for found in changes]
    best = next((i for i, mean in enumerate(means) if mean["base"] <= limit), len(MERGED) - 1)
    found = _result(f"{MERGED[best]:g} × result + base", -means[best]["new"], means[best]["base"], changes[best])
    keys = {"merge.curve": [0, *sorted(MERGED), 1], "merge.choose": f"forgetting<={limit:g}"}
    return found | {"keys": keys, "choices": {}}


def _change(advising: Advising, name: str, scores: Scores) -> tuple[float, float, float]:
    base = advising.base[name]
    change, error = scores.loss - base.loss, 1.28 * (scores.change_error(base) or 0.0)
    return change, change - error, change + error


def _mean(advising: Advising, changes: dict[str, tuple[float, float, float]], role: str) -> float:
    own = [change[0] for name, change in changes.items() if advising.domains[name] == role]
    return sum(own) / max(len(own), 1)


def try_batches(advising: Advising) -> dict[str, Any] | None:
    """Compare runs of equal tokens with larger batches, where several devices are planned (arXiv:2505.23971)."""
    from pretrain.advise.laws import NotSupported
    from pretrain.advise.laws.batch import Branch, critical_batch

    at, found = advising.nearest(), advising.found
    if advising.devices < 2 or at is None:
        return None
    steps = at.probe.steps
    factors = [factor for factor in BATCHES if steps // factor >= MIN_STEPS and steps % factor == 0]
    probes = [_larger(advising, at.probe, factor) for factor in factors]
    runs = [advising.attempt(probe) for probe in probes if advising.probes.fits(probe)]
    tokens = advising.planned.tokens_per_step
    measured = [at, *(run for run in runs if run is not None and not run.diverged)]
    branches = [(tokens * (steps // run.probe.steps), _new_loss(run)) for run in measured]
    try:
        best = critical_batch([Branch(batch, [loss], tokens * steps) for batch, loss in branches])
    except NotSupported as refused:
        found.notes.append(f"The batch of several devices: {refused.reason}.")
        return None
    edge = "; the largest that was tried" if best.at_edge else ""
    return {
        "branches": branches,
        "batch": best.batch,
        "sentence": f"Up to {best.batch:,.0f} tokens per step cost nothing at equal tokens, with the learning rate times "
        f"{best.lr_factor:.2f}{edge}.",
    }


def _larger(advising: Advising, probe: Probe, factor: int) -> Probe:
    micro_batches = advising.config.gradient_accumulation_steps * factor
    return replace(
        probe,
        kind="batch",
        lr=probe.lr * math.sqrt(factor),
        steps=probe.steps // factor,
        trained=probe.trained * factor,  # its steps are larger
        more=(f"gradient_accumulation_steps={micro_batches}", *probe.more),
        keeps_model=False,
    )


def _new_loss(run: Measured) -> float:
    losses = [ys[-1] for name, (_, ys) in run.losses.items() if run.roles[name] == "new"]
    return sum(losses) / len(losses)
