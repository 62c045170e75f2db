"""``merge.choose``: which point between the base model and the result of a run is exported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.runtime.errors import UserError, did_you_mean

FORM = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\s*", re.IGNORECASE)
COMPARED = {"forgetting": "<=", "gain": ">="}


@dataclass(frozen=True)
class Change:
    """A point of the curve, with the mean change of its loss since step 0 in nats per token (``None``: unknown).

    Attributes:
        alpha: Share of the result, between 0 and 1.
        new: Change on the new domains; a gain is below 0.
        base: Change on the base domains; forgetting is above 0.
        checkpoint: Step of the checkpoint that stands for the result; ``None``: the result itself.
    """

    alpha: float
    new: float | None
    base: float | None
    checkpoint: int | None = None


@dataclass(frozen=True)
class Choice:
    """A limit of forgetting, or of the gain."""

    of_what: str
    limit: float

    @property
    def text(self) -> str:
        return f"{self.of_what} {COMPARED[self.of_what]} {self.limit:g}"

    @classmethod
    def of(cls, text: str | None) -> Choice | None:
        """Return the choice that ``text`` describes, ``None`` for ``None``. Nothing in it is run. Raises ``UserError``."""
        if text is None:
            return None
        form = FORM.fullmatch(text)
        if form is None:
            raise UserError(f"merge.choose={text}: write 'forgetting<=0.05' or 'gain>=0.1'")
        name, sign = form[1], form[2]
        if name not in COMPARED:
            raise UserError(f"merge.choose={text}: nothing is called {name!r}{did_you_mean(name, COMPARED)}")
        if sign != COMPARED[name]:
            raise UserError(f"merge.choose={text}: here {name} is limited with {COMPARED[name]}")
        return cls(name, float(form[3]))

    def best(self, points: Iterable[Change]) -> Change | None:
        """Return the best point within the limit, or ``None`` if no point is known to be within it. Within a limit of forgetting
        the largest gain is best, within one of the gain the least forgetting; of equal ones the point closest to the base."""
        known = [(p.new, p.base, p) for p in points if p.new is not None and p.base is not None]
        if self.of_what == "forgetting":
            within = [(new, p) for new, base, p in known if base <= self.limit]
        else:
            within = [(base, p) for new, base, p in known if -new >= self.limit]
        if not within:
            return None
        return min(within, key=lambda pair: (pair[0], pair[1].alpha, pair[1].checkpoint or math.inf))[1]
