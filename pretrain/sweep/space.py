"""The search space of `hydra/sweeper=optuna`, written in Hydra's override grammar.

=============================== ======================================
``lr=interval(1e-5,1e-2)``      any number in between
``lr=tag(log,interval(…))``     any number in between, on a logarithmic scale
``x=int(interval(1,64))``       any integer, both ends included
``x=range(8,65,8)``             one of the numbers; ``tag(log,range(…))`` for steps of 1
``strategy=ddp,fsdp``           one of the choices, without an order; also ``choice(…)`` and ``glob(…)``
``seed=1``                      a fixed value in every trial
=============================== ======================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Space:
    """A search space. ``fixed`` are the overrides that every trial has, ``searched`` the distributions by key, ``keys`` the
    keys as overrides set them."""

    fixed: list[str]
    searched: dict[str, BaseDistribution]
    keys: dict[str, str]  # lr → ++lr

    def holds(self, values: dict[str, Any]) -> bool:
        """Return whether ``values`` belong to this space. A trial that has just started may have only some of the keys."""
        from optuna.trial import TrialState, create_trial

        try:
            create_trial(state=TrialState.RUNNING, params=values, distributions={k: self.searched[k] for k in values})
        except (KeyError, ValueError, TypeError):  # an unknown key, a value outside of its range, or not a number
            return False
        return True

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """Return the overrides of one trial. Numbers are rounded to six digits, which keeps the folder's name readable."""
        words = {key: f"{value:.6g}" if isinstance(value, float) else f"{value}" for key, value in values.items()}
        return [*self.fixed, *(f"{self.keys[key]}={word}" for key, word in words.items())]


def parse_space(arguments: list[str], config_loader: ConfigLoader) -> Space:
    """Parse the search space. ``arguments`` start with an experiment's ``hydra.sweeper.params``; the last one of a key counts.

    Raises ``UserError`` if no key has a range, or if a range is empty or invalid.
    """
    parsed = OverridesParser.create(config_loader=config_loader).parse_overrides(arguments)
    last = {(o.key_or_group, o.package): o for o in parsed}  # dict keeps the first place and the last value
    swept = [o for o in last.values() if o.is_sweep_override()]
    if not swept:
        raise UserError(
            "hydra/sweeper=optuna: nothing to search; give a key a range: 'lr=tag(log,interval(1e-5,1e-2))'"
        )
    keys = {o.get_key_element().lstrip("+"): o.get_key_element() for o in swept}
    searched = dict(zip(keys, map(_distribution, swept), strict=True))
    return Space([str(o.input_line) for o in last.values() if not o.is_sweep_override()], searched, keys)


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    if override.is_choice_sweep():
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    numbers = sorted(value.range()) if isinstance(value, RangeSweep) else [value.start, value.end]
    if not numbers:
        raise UserError(f"{_as_written(override)}: there is no number in this range")
    low, high, log = numbers[0], numbers[-1], "log" in value.tags
    step = abs(value.step) if isinstance(value, RangeSweep) else None
    try:
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log, step=int(step or 1))
        return FloatDistribution(float(low), float(high), log=log, step=None if step is None else float(step))
    except ValueError as error:
        raise UserError(f"{_as_written(override)}: {error}") from None


def _as_written(override: Override) -> str:
    """Return the override as users write it, without the ``++`` that the command line adds."""
    return str(override.input_line).lstrip("+")
