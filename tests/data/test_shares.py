"""Shares, limits and loss weights of the sources of a mixture, also of one in another."""

from operator import mul
from types import SimpleNamespace

import pytest

from pretrain.data.replay import Phase
from pretrain.data.shares import mixture_phases
from pretrain.data.sources.local import Local
from pretrain.data.sources.mixture import Mixture, by_source
from pretrain.data.training_data import Part

SIZES = {"code": 600, "text/es": 300, "text/old/fr": 100, "text/old/pt": 200}


def mixture(**outer):
    old = Mixture(parts={"fr": Local(nameOrPath="f"), "pt": Local(nameOrPath="p")}, max_epochs={"pt": 2.0})
    text = Mixture(
        parts={"es": Local(nameOrPath="e"), "old": old},
        weights={"es": 3, "old": 1},
        max_epochs={"old": 3.0},
        loss_weights={"old": 0.5},
    )
    return Mixture(parts={"code": Local(nameOrPath="c"), "text": text}, **outer)


def shares(dataset, replay_share=0.0, phases=(), replay=()):
    sizes = {name: SIZES[name] for name in dataset.sources()}
    parts = [Part(name, SimpleNamespace(num_tokens=size)) for name, size in sizes.items()]
    parts += [Part(name, SimpleNamespace(num_tokens=size), replay=True) for name, size in replay]
    found = mixture_phases(dataset, parts, replay_share, phases)
    return [dict(zip([part.name for part in parts], phase.shares, strict=True)) for phase in found]


def test_names_of_nested_sources():
    assert {name: source.nameOrPath for name, source in mixture().sources().items()} == {
        "code": "c",
        "text/es": "e",
        "text/old/fr": "f",
        "text/old/pt": "p",
    }
    assert list(Local(nameOrPath="a/b.txt").sources()) == ["b"]


def test_shares_of_nested_parts_divide_that_of_the_outer_one():
    """By weights where there are any, else by size: of all tokens code has a half, of the old ones pt has two thirds."""
    expected = {"code": 0.5, "text/es": 0.375, "text/old/fr": 0.125 / 3, "text/old/pt": 0.25 / 3}
    assert shares(mixture())[0] == pytest.approx(expected)
    assert shares(mixture(weights={"code": 1, "text": 4}))[0] == pytest.approx(
        {"code": 0.2} | {name: expected[name] * 1.6 for name in expected if name != "code"}
    )
    flattened = shares(mixture(temperature=2.0))[0]
    assert flattened["code"] == pytest.approx(0.5), "both have 600 tokens"


def test_phases_and_replay():
    phases = [Phase(0.5, {"code": 1.0}), Phase(0.8, {}, 0.5)]
    found = shares(mixture(), 0.2, phases, [("replay/a", 30), ("replay/b", 10)])
    assert found[0]["code"] == pytest.approx(0.4)
    assert [found[0]["replay/a"], found[0]["replay/b"]] == pytest.approx([0.15, 0.05])
    assert found[1] == pytest.approx(dict.fromkeys(found[1], 0.0) | {"code": 0.8, "replay/a": 0.15, "replay/b": 0.05})
    assert found[2] == pytest.approx(dict.fromkeys(found[2], 0.0) | {"code": 0.5, "replay/a": 0.375, "replay/b": 0.125})
    assert all(sum(phase.values()) == pytest.approx(1) for phase in found)


def test_values_by_part_reach_the_sources_at_every_depth():
    assert by_source(mixture(), "max_epochs", min) == {"text/old/fr": 3.0, "text/old/pt": 2.0}
    outer = mixture(max_epochs={"text": 2.5, "code": 9.0}, loss_weights={"text": 4.0})
    assert by_source(outer, "max_epochs", min) == {"code": 9, "text/es": 2.5, "text/old/fr": 2.5, "text/old/pt": 2}
    assert by_source(outer, "loss_weights", mul) == {"text/es": 4, "text/old/fr": 2, "text/old/pt": 2}
    assert by_source(Local(nameOrPath="x"), "max_epochs", min) == {}
