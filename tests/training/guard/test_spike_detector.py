"""Which losses are spikes, and what the guard makes of it, step by step."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.runtime.errors import UserError
from pretrain.training.guard.config import GuardConfig
from pretrain.training.guard.guard import Guard
from pretrain.training.guard.spike_detector import FINE, NONFINITE, SPIKE, TO_SIGMA, SpikeDetector

CPU = torch.device("cpu")
WINDOW = 8
losses = st.floats(0.5, 12.0, width=32)
windows = st.lists(losses, min_size=WINDOW, max_size=WINDOW)


def judge_of(history, **keys) -> SpikeDetector:
    judge = SpikeDetector(GuardConfig(**{"spike": "skip", "window": WINDOW} | keys), device=CPU)
    judge.load_state(history)
    return judge


def verdict(judge: SpikeDetector, loss: float, norm: float = 1.0) -> int:
    tensor = torch.tensor(loss)
    return int(judge.verdict(tensor, judge.zscore(tensor), torch.tensor(norm)))


@given(windows, losses)
def test_the_zscore_is_that_of_the_textbook(history, loss):
    median = statistics.median_low(history)
    spread = statistics.median_low([abs(x - median) for x in history]) * TO_SIGMA
    expected = (loss - median) / max(spread, median * 1e-3)
    assert float(judge_of(history).zscore(torch.tensor(loss))) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@given(windows, losses)
def test_only_upwards(history, loss):
    judge = judge_of(history, spike_zscore=1e-6)
    assert verdict(judge, loss) == (SPIKE if loss > statistics.median_low(history) else FINE)


@given(st.lists(losses, max_size=WINDOW - 1))
def test_nothing_is_a_spike_before_the_window_is_full(history):
    assert verdict(judge_of(history, spike_zscore=1e-6), 1e30) == FINE


@given(st.lists(losses, max_size=3))
def test_spikes_before_it_hide_no_spike(spikes):
    """Three of eight numbers move the median within the others: what mean and deviation can't do."""
    calm = [2.0 + 0.01 * i for i in range(WINDOW - len(spikes))]
    assert verdict(judge_of([*[100.0 + s for s in spikes], *calm]), 90.0) == SPIKE


@given(windows, st.lists(losses, min_size=1, max_size=20))
def test_a_saved_judge_goes_on_as_if_it_had_never_stopped(history, later):
    one, other = judge_of(history), judge_of(history)
    for loss in later:
        tensor = torch.tensor(loss)
        assert verdict(one, loss) == verdict(other, loss)
        for judge in (one, other):
            judge.accept(tensor, torch.tensor(verdict(judge, loss)))
        other = judge_of(other.state())
    assert torch.equal(one.losses, other.losses)


def test_only_good_losses_come_into_the_window():
    judge = judge_of([2.0] * WINDOW)
    for loss, expected in ((9.0, SPIKE), (math.nan, NONFINITE), (math.inf, NONFINITE), (2.001, FINE)):
        assert verdict(judge, loss) == expected
        judge.accept(torch.tensor(loss), torch.tensor(expected))
    assert judge.state() == [2.0] * (WINDOW - 1) + [pytest.approx(2.001)]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(number):
    judge = judge_of([2.0] * WINDOW)
    assert verdict(judge, number) == verdict(judge, 2.0, norm=number) == NONFINITE
    ignoring = judge_of([2.0] * WINDOW, nonfinite="ignore")
    assert verdict(ignoring, number) == verdict(ignoring, 2.0, norm=number) == FINE


def test_spikes_that_are_ignored():
    """Nothing is worked out, nothing is remembered."""
    judge = judge_of([2.0] * WINDOW, spike="ignore")
    assert math.isnan(judge.zscore(torch.tensor(1e9)))
    judge.accept(torch.tensor(3.0), torch.tensor(FINE))
    assert judge.state() == [2.0] * WINDOW


def test_at_the_threshold_itself():
    judge = judge_of([2.0] * WINDOW, spike_zscore=6.0)
    at = [int(judge.verdict(torch.tensor(2.0), torch.tensor(z), torch.tensor(1.0))) for z in (6.0, 6.001)]
    assert at == [FINE, SPIKE]


def test_infinite_gradients_of_a_scaled_loss_are_the_scalers():
    judge = SpikeDetector(GuardConfig(), device=CPU, scaled=True)
    assert verdict(judge, 2.0, norm=math.inf) == FINE
    assert verdict(judge, math.nan) == NONFINITE


def told(guard: Guard, numbers: list[float]) -> list[int]:
    """The steps that turn out bad, with these losses one after the other."""
    found = []
    for step, number in enumerate(numbers, start=1):
        look = guard.check(torch.tensor(number))
        guard.note(look.loss, torch.tensor(1.0), step=step, first_sample=10 * step)
        found += [bad.step for bad in guard.handle_bad_steps(at_once=True)]
    return found


def guard_of(**keys) -> Guard:
    return Guard(GuardConfig(**keys), device=CPU, quarantine=lambda bad: "a.txt#0")


def test_skips_in_a_row_are_counted_over_a_stop_and_end_the_run():
    guard = guard_of(max_skips_in_a_row=2)
    assert told(guard, [math.nan, math.nan, 1.0, math.nan, math.nan]) == [1, 2, 4, 5]
    resumed = guard_of(max_skips_in_a_row=2)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(UserError, match=r"guard.max_skips_in_a_row=2: step 1: loss nan, .* documents: a.txt#0"):
        told(resumed, [math.nan])


def test_rollbacks_are_counted_and_end_the_run():
    guard = guard_of(nonfinite="rollback", max_rollbacks=2)
    before = guard.state_dict()
    assert told(guard, [math.nan, 1.0, math.nan]) == [1, 3]
    guard.load_state_dict(before)  # back at a checkpoint that knows nothing of them
    assert guard.blocklist == {10, 30}
    with pytest.raises(UserError, match=r"guard.max_rollbacks=2: step 1: "):
        guard.note(torch.tensor(math.nan), torch.tensor(1.0), step=1, first_sample=50)
        list(guard.handle_bad_steps(at_once=True))


def test_a_checkpoint_of_before_there_was_a_guard():
    guard = guard_of(spike="skip", window=8)
    guard.load_state_dict({})
    assert told(guard, [1.0, math.nan]) == [2]
