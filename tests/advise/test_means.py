"""Which means against forgetting are tried, in which order, and the batch of several devices. The probes are made up."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pretrain.advise.found import Found
from pretrain.advise.probes import Measured
from pretrain.run.advise_means import try_batches, try_means
from pretrain.run.advise_scores import Scores
from tests.advise.test_choices import ROLES, run


class Advising:
    """An advice whose probes gain and forget as given, by the first further word of a probe."""

    def __init__(self, measured, *, limit=0.1, devices=1, room=True):
        self.asked = SimpleNamespace(max_forgetting=limit)
        self.found, self.domains, self.devices = Found(lr=1e-3, errors={"new": 0.01, "base": 0.01}), ROLES, devices
        self.can_add_lora = True
        self.config = SimpleNamespace(objective_identity=None, transforms=(), gradient_accumulation_steps=2)
        self.base = {"es": Scores("new", [7.0] * 4, [1] * 4), "english": Scores("base", [3.3] * 4, [1] * 4)}
        self.planned = SimpleNamespace(tokens_per_step=512)
        self.at, self.tried, self.measured = run(1e-3, 0.3, 0.8, 0.4), [], measured
        self.at = replace(self.at, probe=replace(self.at.probe, steps=40))
        self.probes = SimpleNamespace(
            fits=lambda probe: room, spent=0.0, allotment=SimpleNamespace(budget=1e9 if room else 0.0)
        )

    def nearest(self):
        return self.at

    def attempt(self, probe) -> Measured | None:
        self.tried.append(probe)
        if probe.more[0] not in self.measured:
            return None
        found = run(probe.lr, probe.share, *self.measured[probe.more[0]])
        return replace(found, probe=probe)


def test_nothing_is_tried_within_the_limit():
    assert try_means(Advising({}, limit=0.5)) == []
    assert try_means(Advising({}, limit=None)) == []


def test_the_first_that_keeps_the_limit_is_chosen():
    advising = Advising({"transform=[lora]": (0.5, 0.05)})
    (found,) = try_means(advising)
    assert found["chosen"]
    assert (found["keys"], found["choices"]) == ({"lr": 0.01}, {"transform": ["lora"]})
    assert found["changes"]["english"] == pytest.approx((0.05, 0.0372, 0.0628))
    assert (advising.tried[0].lr, advising.tried[0].share, advising.tried[0].steps) == (0.01, 0.3, 40)


def test_the_next_is_tried():
    advising = Advising({"transform=[lora]": (0.5, 0.3), "objective=kl_to_base": (0.4, 0.09)})
    lora, kl = try_means(advising)
    assert (lora["chosen"], kl["chosen"]) == (False, True)
    assert kl["choices"] == {"objective": "kl_to_base"}
    assert "a merge with the base model was not tried" in advising.found.notes[0], "the probe has no model"
    none = Advising({"transform=[lora]": (0.5, 0.3), "objective=kl_to_base": (0.4, 0.2)})
    assert [one["chosen"] for one in try_means(none)] == [False, False]
    assert none.found.notes[-1].startswith("Nothing that was tried keeps forgetting within advise.max_forgetting=0.1")
    assert try_means(Advising({}, room=False)) == []


def test_a_failed_probe_is_passed_over():
    found = try_means(Advising({"objective=kl_to_base": (0.4, 0.09)}))
    assert [one["choices"] for one in found] == [{"objective": "kl_to_base"}]
    assert try_batches(Advising({}, devices=4)) is None
    odd = Advising({"gradient_accumulation_steps=4": (0.8, 0.4)}, devices=4)
    odd.at = replace(odd.at, probe=replace(odd.at.probe, steps=42))
    assert try_batches(odd)["batch"] == 1024
    assert [probe.steps for probe in odd.tried] == [21], "10 steps of 4 times the batch are not as many tokens"


def test_batches_are_compared_at_equal_tokens():
    words = {"gradient_accumulation_steps=4": (0.8, 0.4), "gradient_accumulation_steps=8": (0.6, 0.4)}
    assert try_batches(Advising(words)) is None, "one device"
    advising = Advising(words, devices=4)
    found = try_batches(advising)
    assert [(probe.steps, round(probe.lr, 6), probe.trained) for probe in advising.tried] == [
        (20, 0.001414, 2.0),
        (10, 0.002, 4.0),
    ]
    assert found["branches"] == [(512, pytest.approx(6.2)), (1024, pytest.approx(6.2)), (2048, pytest.approx(6.4))]
    assert found["batch"] == 1024
