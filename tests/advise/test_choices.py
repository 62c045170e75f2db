"""The choices of share and learning rate from what probes have measured, and the warnings about model and text."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.advise import rate, share
from pretrain.advise.advice import predictions
from pretrain.advise.budget import Allotment, Planned
from pretrain.advise.found import Found, checks_of, missed, rms
from pretrain.advise.length import Length, _enough
from pretrain.advise.look import DomainLook, Look, card_tokens, warnings_of
from pretrain.advise.probes import Measured, Probe, Probes, words_of_probes
from pretrain.runtime.errors import UserError

SHARES = [round(0.1 * i, 1) for i in range(1, 10)]
BASE = {"es": 7.0, "english": 3.3}
ROLES = {"es": "new", "english": "base"}
LOSSES = {  # y = exp(c) + exp(a + b x)
    "es": [4.0 + 2.0 * math.exp(-3 * x) for x in SHARES],
    "english": [3.2 + 0.02 * math.exp(4 * x) for x in SHARES],
}


def chosen(**changes):
    given = {"prior_replay": 0.1, "penalty": 0.0, "max_forgetting": None} | changes
    return share.choose(SHARES, LOSSES, BASE, ROLES, **given)


def run(lr, replay, es, english, *, name="run"):
    losses = {"es": ([0, 8], [7.0, 7.0 - es]), "english": ([0, 8], [3.3, 3.3 + english])}
    return Measured(Probe("lr", lr, replay, 8), Path(name), losses, ROLES, [lr] * 8, 100.0, 1.0)


def test_the_share_is_the_minimum_of_the_sum():
    found = chosen()
    sums = {x: new + old for x, new, old in zip(SHARES, LOSSES["es"], LOSSES["english"], strict=True)}
    best = math.log(6 / 0.08) / 7  # where the derivative, -6 exp(-3x) + 0.08 exp(4x), is 0
    assert min(sums, key=sums.get) == round(best, 1)
    assert found.law
    assert found.replay == pytest.approx(1 - best, abs=0.02)
    assert found.low <= found.replay <= found.high
    assert found.change(found.replay, "new") == pytest.approx(4.0 + 2.0 * math.exp(-3 * best) - 7.0, abs=0.02)


def test_a_limit_takes_more_old_text():
    free, limited = chosen(), chosen(max_forgetting=0.02)
    assert limited.replay > free.replay
    assert limited.change(limited.replay, "base") <= 0.02
    assert limited.change(limited.replay - 0.02, "base") > 0.02, "no more than needed"
    impossible = chosen(max_forgetting=-0.5)
    assert impossible.replay == free.replay
    assert "no share keeps forgetting" in impossible.reason


def test_without_a_law_the_best_measured_point_is_taken():
    humped = LOSSES | {"english": [3.4 + 0.5 * math.sin(math.pi * x) for x in SHARES]}
    found = share.choose(SHARES, humped, BASE, ROLES, prior_replay=0.1, penalty=0.0, max_forgetting=None)
    sums = [humped["es"][i] + humped["english"][i] for i in range(9)]
    assert not found.law
    assert found.replay == pytest.approx(1 - SHARES[sums.index(min(sums))])
    assert found.reason.startswith("measured points; ")


def test_both_roles_weigh_alike():
    assert share.weights_of({"a": "new", "b": "new", "c": "base"}) == {"a": 0.5, "b": 0.5, "c": 1.0}


def test_the_rate_is_the_largest_within_the_limit():
    runs = [run(1e-4, 0.1, 0.2, 0.01), run(3e-4, 0.1, 0.5, 0.04), run(1e-3, 0.1, 0.8, 0.2), run(3e-3, 0.1, 0.9, 0.9)]
    free = rate.choose(runs, max_forgetting=None, gain_error=0.0, forgetting_error=0.0)
    limited = rate.choose(runs, max_forgetting=0.1, gain_error=0.0, forgetting_error=0.0)
    assert free.lr > 1e-3
    assert 3e-4 < limited.lr < 1e-3
    assert limited.forgetting[0] <= 0.1
    assert limited.within_limit
    none = rate.choose(runs, max_forgetting=0.001, gain_error=0.0, forgetting_error=0.0)
    assert (none.lr, none.within_limit) == (1e-4, False)


def test_old_text_that_improves_is_expected_as_measured():
    """The choice takes forgetting as growing with the rate; the expectation must not."""
    runs = [run(1e-4, 0.1, 0.2, -0.1), run(1e-3, 0.1, 0.8, -0.5), run(1e-2, 0.1, 0.9, -1.2)]
    found = rate.choose(runs, max_forgetting=0.0, gain_error=0.01, forgetting_error=0.01)
    assert found.forgetting[0] == pytest.approx(-0.5 - 0.7 * math.log10(found.lr / 1e-3), abs=1e-9)
    assert found.forgetting[1] < found.forgetting[0] - 0.0127 < found.forgetting[0] + 0.0127 < found.forgetting[2]
    assert found.low <= found.lr <= found.high


def test_rates_that_diverge():
    broken = [Measured(Probe("lr", lr, None, 8), Path("x"), {}, ROLES, [], 1.0, 1.0) for lr in (1e-2, 3e-2, 1e-1)]
    with pytest.raises(UserError, match="every learning rate that was tried diverged"):
        rate.choose(broken, max_forgetting=None, gain_error=0.0, forgetting_error=0.0)
    found = rate.choose([run(1e-4, 0.1, 0.2, 0.01), *broken], max_forgetting=None, gain_error=0.0, forgetting_error=0.0)
    assert found.lr == 1e-4
    assert found.reason.startswith("the best of the measured rates; 1 different learning rates were measured")


def test_a_check_compares_differences():
    (new, base) = checks_of(chosen(), run(1e-3, 0.1, 0.8, 0.2), run(1e-3, 0.5, 0.6, 0.05))
    assert new["measured"] == pytest.approx(0.2)
    assert base["measured"] == pytest.approx(-0.15)
    assert new["predicted"] == pytest.approx(2 * math.exp(-1.5) - 2 * math.exp(-2.7), abs=0.02)


def test_intervals_of_the_share_hold_what_true_runs_miss():
    def half(found):
        _, value, low, high = found.curves["es"][16]
        assert low < value < high
        return (high - low) / 2

    assert half(chosen(error=0.0)) < 0.005
    assert half(chosen()) == pytest.approx(1.28 * 0.02, rel=0.2)
    assert half(chosen(error=0.1)) == pytest.approx(1.28 * 0.1, rel=0.2)
    assert chosen(error=0.1).replay == chosen().replay
    assert rms([{"predicted": 0.1, "measured": 0.4}, {"predicted": 0.5, "measured": 0.1}]) == pytest.approx(0.125**0.5)


def test_a_moved_share_moves_the_prediction():
    found = Found(share=chosen(), lr=1e-3, replay=0.5, errors={"new": 0.01, "base": 0.01})
    allotment = Planned(100, 10, {}), Allotment(8, 4, 2, 1, 4, 100, 1.0, 2.0)
    probes = SimpleNamespace(planned=allotment[0], allotment=allotment[1])
    at = run(1e-3, 0.3, 0.8, 0.2)
    moved = predictions(found, ROLES, at, probes)
    step = 2 * (math.exp(-1.5) - math.exp(-2.1))
    value, low, high = moved["es"].change
    assert value == pytest.approx(-0.8 + step, abs=0.01)
    assert high - low == pytest.approx(2 * (0.0128 + step / 2), abs=0.01)
    found.replay = 0.3
    assert predictions(found, ROLES, at, probes)["es"].change[0] == pytest.approx(-0.8)


def test_a_far_prediction_comes_with_a_warning():
    given = [100], {"es": [(-1.0, -1.1, -0.9)]}
    assert Length(*given, extrapolation=7.0).warnings == []
    assert (
        Length(*given, extrapolation=12.0)
        .warnings[0]
        .startswith("The learning rates of the planned run sum to 12 times")
    )
    assert Length([100], {}, extrapolation=40.0).warnings == []


def test_a_probe_measures_and_does_not_stop():
    """A rate that diverges is a result, and what the budget does not count is not done."""
    allotment = Allotment(10, 4, 2, 1, 4, 100, 1.0, 2.0)
    probes = Probes(
        None, ["guard.nonfinite=stop"], Planned(100, 10, {}), allotment, without=("~evaluation.questions.a",)
    )
    words = probes.overrides(Probe("lr", 1e-3, None, 10))
    expected = {
        "guard.nonfinite=skip",
        "guard.max_skips_in_a_row=10",
        "guard.spike=ignore",
        "evaluation.lm_eval.tasks=[]",
    }
    assert expected | {"~evaluation.questions.a", "evaluate_every=3"} <= set(words)
    assert "guard.nonfinite=stop" not in words


def test_a_law_that_misses_true_runs_is_reported():
    close, far = ({"predicted": 0.1, "measured": m} for m in (0.12, -0.1))
    assert missed([close]) == []
    assert missed([close, far])[0].startswith(
        "Between two shares, true runs and the mixture of the LoRA probes differ by 0.20"
    )


def test_a_shorter_run_is_enough():
    lengths = list(range(100, 1001, 100))
    changes = [(-1 - 0.3 * (1 - math.exp(-i)), 0.0, 0.0) for i in range(10)]
    assert _enough(lengths, {"es": changes}, {"es": "new"}, 0.01) == 400
    assert _enough(lengths, {"es": [(-0.1 * i, 0.0, 0.0) for i in range(10)]}, {"es": "new"}, 0.01) is None
    assert _enough(lengths, {}, {"es": "new"}, 0.01) is None
    assert Length(lengths, {}, {"es": "too few"}).record()["refused"] == {"es": "too few"}


def look(**changes):
    domains = {
        "es": DomainLook("new", 7.0, 5.5, 1000, 0.6, 3.0),
        "english": DomainLook("base", 3.3, 1.4, 1000, 0.3, 1.5),
    }
    given = {"uniform_loss": 8.3, "parameters": 10**6, "card_tokens": None, "new_tokens": 1000, "epochs": 1.0} | changes
    return Look(given.pop("domains", domains), **given)


def test_warnings():
    assert [w[:37] for w in warnings_of(look())] == ["The tokenizer does not fit the new te"]
    known = {"es": DomainLook("new", 3.0, 1.3, 9, 0.3, 1.0), "english": DomainLook("base", 3.3, 1.4, 9, 0.3, 1.5)}
    found = warnings_of(look(domains=known, epochs=9.0, card_tokens=2e9, common=3, near=4))
    starts = (
        "The model knows",
        "The planned run reads the new text 9.0 times",
        "3 documents",
        "4 documents",
        "By its",
    )
    assert len(found) == len(starts)
    assert all(text.startswith(start) for text, start in zip(found, starts, strict=True))
    assert warnings_of(look(uniform_loss=5.0))[0].startswith("At step 0 the model is worse than a uniform guess")
    good = {"es": DomainLook("new", 4.0, 1.9, 9, 0.3, 1.0), "english": known["english"]}
    assert warnings_of(look(domains=good)) == []


def test_a_model_card(tmp_path):
    assert card_tokens(tmp_path) is None
    (tmp_path / "README.md").write_text("A model of 1.7B parameters, trained on 11 trillion tokens.")
    assert card_tokens(tmp_path) == 11e12
    (tmp_path / "README.md").write_text("Trained on 300B high-quality tokens")
    assert card_tokens(tmp_path) == 300e9
    (tmp_path / "README.md").write_text("Trained on 1,000B tokens")
    assert card_tokens(tmp_path) == 1e12
    (tmp_path / "README.md").write_text("Trained on 1,5 trillion tokens")
    assert card_tokens(tmp_path) == 1.5e12
    (tmp_path / "README.md").write_text("It has 4096 tokens of context and 7B parameters")
    assert card_tokens(tmp_path) is None


def test_the_words_that_probes_share():
    given = [
        "++task=advise",
        "++output_dir=x",
        "dataset=local",
        "++dataset.nameOrPath=es",
        "++advise.budget=1",
        "++lr=1e-3",
    ]
    given += ["dataset@replay.source=local", "++max_steps=100", "sink=[wandb]", "++batch_size=4", "++replay.share=0.2"]
    expected = [
        "dataset=local",
        "dataset.nameOrPath=es",
        "dataset@replay.source=local",
        "batch_size=4",
        "replay.share=0.2",
    ]
    assert words_of_probes(given) == expected
