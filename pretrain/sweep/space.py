"""What `hydra/sweeper=optuna` searches, said in Hydra's override grammar.

=============================== ======================================
``lr=interval(1e-5,1e-2)``      any number in between
``lr=tag(log,interval(…))``     the same, each decade as likely as another
``x=int(interval(1,64))``       any whole number, both ends included
``x=range(8,65,8)``             one of the numbers; ``tag(log,range(…))`` for steps of 1
``strategy=ddp,fsdp``           one of the choices, without an order; also ``choice(…)`` and ``glob(…)``
``seed=1``                      the same in every trial
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
    fixed: list[str]
    searched: dict[str, BaseDistribution]
    keys: dict[str, str]  # the searched ones as an override sets them: lr → ++lr

    def holds(self, values: dict[str, Any]) -> bool:
        """Whether ``values`` are of this space; those of a trial that has just been begun may not be all."""
        try:
            return all(self.searched[k]._contains(self.searched[k].to_internal_repr(v)) for k, v in values.items())
        except (KeyError, ValueError, TypeError):  # another key, another choice, no number
            return False

    def overrides(self, values: dict[str, Any]) -> list[str]:
        """One trial's command line. Six digits of a number are enough to try it, and a folder's name stays readable."""
        words = {key: f"{value:.6g}" if isinstance(value, float) else f"{value}" for key, value in values.items()}
        return [*self.fixed, *(f"{self.keys[key]}={word}" for key, word in words.items())]


def parse_space(arguments: list[str], config_loader: ConfigLoader) -> Space:
    """``arguments``: an experiment's ``hydra.sweeper.params`` are the first of them; the last one of a key counts.

    Raises ``UserError`` when nothing is left to choose, or for a range that is none.
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
        raise UserError(f"{_said(override)}: there is no number in this range")
    low, high, log = numbers[0], numbers[-1], "log" in value.tags
    step = abs(value.step) if isinstance(value, RangeSweep) else None
    try:
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log, step=int(step or 1))
        return FloatDistribution(float(low), float(high), log=log, step=None if step is None else float(step))
    except ValueError as error:
        raise UserError(f"{_said(override)}: {error}") from None


def _said(override: Override) -> str:
    """As people write it, without the ``++`` that the command line puts before it."""
    return str(override.input_line).lstrip("+")
