"""What the probes of ``task=advise`` may cost, and how the budget is divided among them.

Costs are counted in trained tokens of full fine-tuning (6 FLOPs per parameter): a forward is a third of one, a token trained
with LoRA two thirds, because the gradients of the frozen weights are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.advise.config import AdviseConfig

FORWARD, LORA = 1 / 3, 2 / 3  # cost of a token that is scored, and of one that is trained with LoRA
MIN_STEPS = 8  # a shorter probe is mostly warm-up
GOOD_STEPS = 24  # with fewer, probes are rather left out than shortened
MIN_SCORED = 1024  # tokens of a domain; fewer do not tell two probes apart
SCORED_SHARE = 0.25  # of the budget that scores may take where there is more text to score
POINTS = 9  # interpolated adapters that are scored
EVALUATIONS = 4  # of a probe, after step 0


@dataclass(frozen=True)
class Planned:
    """The planned run.

    Attributes:
        steps: Its optimizer steps.
        tokens_per_step: Target tokens of a step, over all devices.
        held_out: Held-out tokens of each domain that may be scored.
        trained: Cost of a trained token: 1, or that of LoRA.
        has_old_text: Whether there is text to replay.
        probe_trained: Cost of a trained token of the probes of the share.
        least: Tokens of each domain that are scored at least: its first document is scored as a whole.
    """

    steps: int
    tokens_per_step: int
    held_out: dict[str, int]
    trained: float = 1.0
    has_old_text: bool = True
    probe_trained: float = LORA
    least: dict[str, int] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        return self.steps * self.tokens_per_step * self.trained


@dataclass(frozen=True)
class Allotment:
    """How the budget is divided.

    Attributes:
        steps: Optimizer steps of each probe; 0 where nothing is trained.
        rates: Number of learning rates that are tried.
        share_probes: Number of probes between which adapters are interpolated: 2 or 0.
        checks: Number of short runs at the chosen share and another one.
        evaluations: Evaluations of a probe after step 0.
        scored: Tokens of each domain that are scored.
        cost: Upper bound of the cost of all of that.
        budget: What may be spent.
    """

    steps: int
    rates: int
    share_probes: int
    checks: int
    evaluations: int
    scored: int
    cost: float
    budget: float


def allot(planned: Planned, config: AdviseConfig) -> Allotment:
    """Divide the budget: as many probes as asked for with as many steps as it allows; fewer of them where they would be shorter
    than `GOOD_STEPS`.

    Raises ``UserError`` where not even the fewest probes of `MIN_STEPS` steps fit.
    """
    trains = bool({"lr", "share"} & set(config.steps))
    least = config.probe_steps or MIN_STEPS
    if trains and planned.steps < least:
        raise UserError(
            f"task=advise: the planned run has {planned.steps} steps, and a probe has at least {least}; a run as short as that "
            "is its own probe: start it"
        )
    good = config.probe_steps or min(planned.steps, GOOD_STEPS)
    found = [one for one in _allotments(planned, config) if one is not None]
    best = next((one for one in found if one.steps >= good or not trains), found[-1] if found else None)
    if best is None or (config.probe_steps and best.steps + EVALUATIONS <= config.probe_steps):
        needed = _least(planned, config, least) / planned.cost
        raise UserError(
            f"advise.budget={config.budget:g}: too little for any probe of {least} steps; the fewest probes cost "
            f"{needed:.2g} of the planned run ({planned.steps:,} steps), so set advise.budget={_up(needed)} or plan a longer run"
        )
    return best


def _candidates(planned: Planned, config: AdviseConfig) -> Iterator[tuple[int, int, int, int]]:
    """Yield rates, share probes, checks and evaluations, the most informative first."""
    rates = config.rates if "lr" in config.steps else 0
    shares = 2 if "share" in config.steps and planned.has_old_text else 0
    checks = config.checks if shares else 0
    checks += bool(checks and not rates)  # a check compares two runs, of which one is usually a learning rate's
    for c in range(checks, -1, -1):
        yield rates, shares, c, EVALUATIONS
    for evaluations in range(EVALUATIONS - 1, 0, -1):
        yield min(rates, 3), shares, 0, evaluations


def _allotments(planned: Planned, config: AdviseConfig) -> Iterator[Allotment | None]:
    budget, domains = config.budget * planned.cost, len(planned.held_out)
    most = max(planned.held_out.values(), default=0)
    for rates, shares, checks, evaluations in _candidates(planned, config):
        scorings, weight = _scorings(rates, shares, checks, evaluations), _weight(planned, rates, shares, checks)
        affordable = (SCORED_SHARE if weight else 1.0) * budget / (FORWARD * max(domains * scorings, 1))
        for scored in (min(max(affordable, MIN_SCORED), most), min(MIN_SCORED, most)):
            scoring = scorings * _score_cost(planned, int(scored))
            steps = _steps(planned, config, budget - scoring, weight, evaluations) if weight else 0
            cost = scoring + steps * planned.tokens_per_step * weight
            if cost <= budget and (steps >= MIN_STEPS or not weight):
                yield Allotment(steps, rates, shares, checks, evaluations, int(scored), cost, budget)
                break
        else:
            yield None


def _steps(planned: Planned, config: AdviseConfig, room: float, weight: float, evaluations: int) -> int:
    """Return the steps of each probe, a multiple of its evaluations, for which there is room."""
    steps = min(
        int(max(room, 0) / (planned.tokens_per_step * weight)), planned.steps, config.probe_steps or planned.steps
    )
    return steps - steps % evaluations


def _weight(planned: Planned, rates: int, shares: int, checks: int) -> float:
    """Return the cost of one step of all probes, in tokens of a step."""
    return (rates + checks) * planned.trained + shares * planned.probe_trained


def _scorings(rates: int, shares: int, checks: int, evaluations: int) -> int:
    """Return how often each domain is scored."""
    return 1 + (rates + shares + checks) * (evaluations + 1) + (POINTS if shares else bool(rates))


def _score_cost(planned: Planned, scored: int) -> float:
    tokens = (max(min(scored, held_out), planned.least.get(name, 0)) for name, held_out in planned.held_out.items())
    return FORWARD * sum(tokens)


def _least(planned: Planned, config: AdviseConfig, steps: int) -> float:
    rates, shares, checks, evaluations = [*_candidates(planned, config)][-1]
    scoring = _scorings(rates, shares, checks, evaluations) * _score_cost(planned, MIN_SCORED)
    return scoring + steps * planned.tokens_per_step * _weight(planned, rates, shares, checks)


def _up(value: float) -> str:
    """Return ``value`` rounded up to two digits."""
    return f"{value * 1.05:.2g}"


def run_cost(planned: Planned, allotment: Allotment, *, steps: int, trained: float) -> float:
    """Return the cost of one probe with its evaluations."""
    scoring = (allotment.evaluations + 1) * _score_cost(planned, allotment.scored)
    return steps * planned.tokens_per_step * trained + scoring
