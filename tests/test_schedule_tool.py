"""`python -m pretrain.tools.schedule`: the picture of a run's schedule, from the words of its command line."""

import pytest

from pretrain.config.compose import run_config
from pretrain.runtime.errors import UserError
from pretrain.tools.schedule import HEIGHT, as_text, learning_rates, show


def test_the_values_are_those_of_the_run(tmp_path, capsys):
    words = ["scheduler=wsd", "scheduler.decay=linear", "lr=4e-4", "warmup_proportion=0.2", "max_steps=10"]
    values = learning_rates(run_config(words))
    assert values == pytest.approx([2e-4, *[4e-4] * 8, 2e-4])
    show(words, tmp_path / "lr.svg")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "wsd: learning rate"
    assert printed[1] == "   0.0004 │ ████████"
    assert printed[HEIGHT // 2] == "          │ ████████", "half the height is full at the last step from its middle on"
    assert printed[HEIGHT // 2 + 1] == "          │██████████"
    assert printed[-1] == str(tmp_path / "lr.svg")
    svg = (tmp_path / "lr.svg").read_text()
    assert svg.startswith("<?xml")
    assert "wsd: learning rate" in svg


def test_a_peak_that_is_not_known_yet_is_1():
    assert max(learning_rates(run_config(["scheduler=infinite"]))) == 1
    assert len(learning_rates(run_config([]))) == 1000
    with pytest.raises(UserError, match=r"scheduler.start_lr=0.001: this picture needs the peak as a number, lr="):
        learning_rates(run_config(["scheduler.start_lr=1e-3"]))


def test_a_warm_up_that_is_none_has_no_start():
    with pytest.raises(UserError, match=r"scheduler.start_lr=0.001: .* warmup_proportion=0 leaves none"):
        run_config(["scheduler.start_lr=1e-3", "warmup_proportion=0"])


def test_one_step():
    assert as_text([0.5]).splitlines()[0] == "      0.5 │█"
