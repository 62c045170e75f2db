"""How the budget of an advice is divided."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.advise.budget import (
    FORWARD,
    MIN_SCORED,
    MIN_STEPS,
    POINTS,
    Planned,
    _score_cost,
    allot,
    run_cost,
)
from pretrain.advise.config import AdviseConfig
from pretrain.runtime.errors import UserError

HELD_OUT = {"es": 40_000, "english": 32_768}


def test_a_fifth_of_a_long_run():
    planned = Planned(10_000, 8_192, HELD_OUT)
    found = allot(planned, AdviseConfig())
    assert (found.rates, found.share_probes, found.checks, found.evaluations) == (4, 2, 1, 4)
    assert found.scored == 40_000, "all of the text"
    scoring = FORWARD * (1 + 7 * 5 + POINTS) * 72_768
    steps = int((0.2 * 10_000 * 8_192 - scoring) / (8_192 * (5 + 2 * 2 / 3)))
    assert found.steps == steps - steps % 4
    assert found.cost == pytest.approx(scoring + found.steps * 8_192 * (5 + 4 / 3))


def test_probes_are_left_out_where_they_would_be_short():
    planned = Planned(400, 2_048, HELD_OUT)
    roomy, narrow = (allot(planned, AdviseConfig(budget=b)) for b in (2.0, 0.2))
    assert (roomy.rates, roomy.checks) == (4, 1)
    assert roomy.steps > 24
    assert (narrow.rates, narrow.checks, narrow.evaluations) == (3, 0, 1)
    assert MIN_STEPS <= narrow.steps < 24


def test_only_a_look_trains_nothing():
    found = allot(Planned(5, 2_048, HELD_OUT), AdviseConfig(steps=["look"], budget=10.0))
    assert (found.steps, found.rates, found.share_probes) == (0, 0, 0)
    assert found.cost == pytest.approx(FORWARD * 2 * min(found.scored, 32_768), rel=0.2)


def test_too_little():
    with pytest.raises(
        UserError, match=r"^advise.budget=0.01: too little .* set advise.budget=0\.\d+ or plan a longer"
    ):
        allot(Planned(200, 2_048, HELD_OUT), AdviseConfig(budget=0.01))
    with pytest.raises(UserError, match="the planned run has 5 steps, and a probe has at least 8"):
        allot(Planned(5, 2_048, HELD_OUT), AdviseConfig(budget=50.0))
    with pytest.raises(UserError, match=r"any probe of 150 steps.*set advise.budget=[\d.]+ "):
        allot(Planned(200, 2_048, HELD_OUT), AdviseConfig(probe_steps=150))


def test_what_the_message_names_is_enough():
    for planned in (Planned(200, 2_048, HELD_OUT), Planned(30, 512, {"es": 3_000, "english": 900})):
        with pytest.raises(UserError) as refused:
            allot(planned, AdviseConfig(budget=0.001))
        named = float(str(refused.value).partition("so set advise.budget=")[2].split()[0])
        assert allot(planned, AdviseConfig(budget=named)).steps >= MIN_STEPS


@given(
    st.integers(8, 100_000),
    st.integers(64, 1 << 20),
    st.integers(200, 200_000),
    st.floats(0.01, 20),
    st.integers(3, 5),
    st.integers(0, 2),
    st.booleans(),
)
def test_the_budget_is_never_exceeded(steps, tokens, held_out, budget, rates, checks, has_old_text):
    planned = Planned(steps, tokens, {"new": held_out, "old": held_out // 2}, has_old_text=has_old_text)
    try:
        found = allot(planned, AdviseConfig(budget=budget, rates=rates, checks=checks))
    except UserError:
        return
    assert MIN_STEPS <= found.steps <= steps
    assert min(MIN_SCORED, held_out) <= found.scored <= held_out
    probes = [1.0] * (found.rates + found.checks) + [planned.probe_trained] * found.share_probes
    spent = sum(run_cost(planned, found, steps=found.steps, trained=trained) for trained in probes)
    spent += (1 + POINTS * bool(found.share_probes)) * _score_cost(planned, found.scored)
    assert spent <= found.budget * (1 + 1e-9)
    assert spent <= found.cost * (1 + 1e-9)


def test_a_long_first_document_is_counted():
    planned = Planned(2_000, 512, HELD_OUT, least={"es": 30_000, "english": 10})
    found = allot(planned, AdviseConfig(budget=2.0))
    assert found.scored < 30_000
    assert _score_cost(planned, found.scored) == pytest.approx(FORWARD * (30_000 + found.scored))
    assert found.cost <= found.budget
