"""The replay share and its checks, from probes that are made up."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pretrain.advise.found import Found
from pretrain.advise.probes import Measured, Probe
from pretrain.run.advise_scores import Scores
from pretrain.run.advise_share import check_share, choose_share
from tests.advise.test_choices import BASE, LOSSES, ROLES, run


class Advising:
    """An advice whose true runs gain and forget as given, by their replay share; others fail."""

    def __init__(self, measured, *, checks=2, limit=None):
        self.asked = SimpleNamespace(max_forgetting=limit, prior_share=None, penalty=0.0)
        self.found, self.config = Found(lr=1e-3, replay=0.1), SimpleNamespace(replay=SimpleNamespace(share=0.0))
        self.base = {name: Scores(ROLES[name], [loss], [1]) for name, loss in BASE.items()}
        self.allotment = SimpleNamespace(checks=checks)
        self.probes = SimpleNamespace(fits=lambda probe: True)
        self.rate_runs, self.measured = [], measured

    def full(self, lr, replay, kind):
        return Probe(kind, lr, replay, 8)

    def attempt(self, probe) -> Measured | None:
        if probe.share not in self.measured:
            self.found.notes.append("failed")
            return None
        return replace(run(probe.lr, probe.share, *self.measured[probe.share]), probe=probe)

    def weights_of(self, run):
        return run

    def between(self, first, second, weights):
        assert (first.probe.share, second.probe.share) == (0.9, 0.1), "from the most old text to the least"
        return [{name: Scores(ROLES[name], [ys[i]], [1]) for name, ys in LOSSES.items()} for i in range(len(weights))]

    def errors_of(self, scores):
        return {"new": 0.01}


PROBED = {0.9: (0.5, 0.0), 0.1: (0.8, 0.3)}


def both(advising):
    choose_share(advising, [Probe("share", 1e-2, share, 8) for share in (0.1, 0.9)])
    at = advising.found.replay
    if advising.found.share is not None:
        advising.rate_runs = [run(1e-3, at, 0.8, 0.2)]
        check_share(advising)
    return advising.found


def test_the_intervals_hold_what_the_checks_miss():
    free = both(Advising(PROBED))
    assert free.checks == []
    assert free.notes == ["failed", "failed"], "a check that fails leaves the share as it is"
    at = free.replay
    checked = both(Advising(PROBED | {round(at + 0.3, 2): (0.5, 0.1), round(at - 0.1, 2): (0.9, 0.3)}))
    assert len(checked.checks) == 4
    assert checked.replay == at
    assert len(checked.notes) <= 1, "what is missed is said once"

    def width(found):
        _, _, low, high = found.share.curves["es"][16]
        return high - low

    missed = sum((c["measured"] - c["predicted"]) ** 2 for c in checked.checks) / 4
    assert width(checked) == pytest.approx(2 * 1.28 * missed**0.5, rel=0.25)
    assert width(free) == pytest.approx(2 * 1.28 * 0.02, rel=0.25)


def test_a_probe_of_the_share_that_fails_chooses_none():
    found = both(Advising({0.9: (0.5, 0.0)}))
    assert found.share is None
    assert found.replay == 0.1
    assert found.notes[-1] == "A probe of the replay share failed or diverged, so the share was not chosen."


def test_more_old_text_where_a_check_keeps_the_limit():
    at = both(Advising(PROBED)).replay
    found = both(Advising(PROBED | {round(at + 0.3, 2): (0.7, 0.0)}, checks=1, limit=0.15))
    assert found.replay == pytest.approx(at + 0.075, abs=0.006)
