from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.optim import schedule
from pretrain.optim.schedule import constant, cosine, infinite, inverse_sqrt, linear, wsd
from pretrain.runtime.errors import UserError

Schedule = Callable[..., float]
ALL: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "linear to 0.1": partial(linear, min_lr_ratio=0.1),
    "cosine": cosine,
    "cosine to 0.1": partial(cosine, min_lr_ratio=0.1),
    "cosine, restarts": partial(cosine, cycles=3, min_lr_ratio=0.1),
    "wsd": wsd,
    "wsd to 0.1": partial(wsd, min_lr_ratio=0.1, decay_proportion=0.5),
    "wsd, linear": partial(wsd, decay="linear"),
    "wsd, cosine": partial(wsd, decay="cosine", decay_proportion=0.5),
    "infinite": infinite,
    "infinite, inverse_sqrt": partial(infinite, cooldown="inverse_sqrt", cooldown_steps=7),
    "infinite, no decay": partial(infinite, decay_proportion=0.0),
    "inverse_sqrt": inverse_sqrt,
}
LENGTHS = st.integers(1, 500).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total)))


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None)
@given(lengths=LENGTHS)
def test_every_schedule(name: str, lengths: tuple[int, int]) -> None:
    total, warm = lengths
    values = [ALL[name](step, total_steps=total, warmup_steps=warm) for step in range(total + 3)]
    assert all(0 <= v <= 1 for v in values)
    assert values[:warm] == pytest.approx([(i + 1) / warm for i in range(warm)])
    assert values[0] > 0 or total == 1
    if warm < total and "wsd" not in name:
        assert values[warm] == 1  # the peak is reached and used
    if name != "inverse_sqrt":  # which does not depend on the length
        assert values[-1] == values[-2]  # beyond the end nothing happens any more
    if "restarts" not in name:
        assert all(a >= b for a, b in zip(values[warm:], values[warm + 1 :], strict=False))


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_ends(schedule: Schedule) -> None:
    at = partial(schedule, total_steps=11, warmup_steps=2, min_lr_ratio=0.1)
    assert [at(0), at(1), at(2)] == [0.5, 1, 1]
    assert at(6) == pytest.approx(0.55)
    assert at(10) == pytest.approx(0.1)
    assert at(1000) == pytest.approx(0.1)
    assert schedule(11, total_steps=11, warmup_steps=2) == pytest.approx(0), "unless another end is asked for"
    assert schedule(10, total_steps=11, warmup_steps=2) > 0, "and then the last step trains too"


def test_no_warmup_starts_at_the_peak() -> None:
    assert all(s(0, total_steps=10, warmup_steps=0) == 1 for s in ALL.values())


def test_all_warmup_never_decays() -> None:
    values = [cosine(step, total_steps=4, warmup_steps=4) for step in range(4)]
    assert values == [0.25, 0.5, 0.75, 1]


def test_one_step_trains() -> None:
    assert cosine(0, total_steps=1, warmup_steps=1) == 1
    assert all(s(0, total_steps=2, warmup_steps=0) > 0 for s in ALL.values())


def test_a_single_step_without_warmup_trains() -> None:
    assert all(s(0, total_steps=1, warmup_steps=0) == 1 for s in ALL.values())


def test_restart() -> None:
    at = partial(cosine, total_steps=100, warmup_steps=0, cycles=2)
    assert 0 < at(49) < 0.01
    assert at(50) == 1
    assert at(25) == pytest.approx(0.5)
    assert at(75) == pytest.approx(0.5)
    assert 0 < at(99) < 0.01
    assert at(100) == pytest.approx(0)


def test_wsd() -> None:
    at = partial(wsd, total_steps=100, warmup_steps=10, decay_proportion=0.2)
    assert at(80) == at(79) == at(10) == 1
    assert at(81) == pytest.approx(1 - math.sqrt(1 / 20))
    assert at(85) == pytest.approx(1 - math.sqrt(5 / 20))
    assert at(99) == pytest.approx(1 - math.sqrt(19 / 20))
    unasked = [wsd(step, total_steps=100, warmup_steps=10) for step in (80, 81)]
    assert unasked == [1, at(81)], "the last fifth, unless another part is asked for"


# Every schedule at every corner: (total steps, warm-up steps) → the values of all steps.
CORNERS: dict[str, tuple[Schedule, int, int, list[float]]] = {
    "constant, one step": (constant, 1, 0, [1]),
    "constant, one step of warm-up": (constant, 1, 1, [1]),
    "constant": (constant, 4, 2, [1 / 2, 1, 1, 1]),
    "constant, warm-up is all": (constant, 3, 3, [1 / 3, 2 / 3, 1]),
    "constant, warm-up is more": (constant, 2, 4, [1 / 4, 1 / 2]),
    "linear, one step": (linear, 1, 0, [1]),
    "linear to 0 ends after the last step": (linear, 4, 0, [1, 3 / 4, 1 / 2, 1 / 4]),
    "linear to 0.1 ends at the last step": (ALL["linear to 0.1"], 4, 0, [1, 0.7, 0.4, 0.1]),
    "linear, warmed up": (ALL["linear to 0.1"], 5, 1, [1, 1, 0.7, 0.4, 0.1]),
    "linear, one step left": (ALL["linear to 0.1"], 3, 2, [1 / 2, 1, 1]),
    "linear, warm-up is more": (linear, 2, 4, [1 / 4, 1 / 2]),
    "cosine, one step": (ALL["cosine to 0.1"], 1, 0, [1]),
    "cosine to 0": (cosine, 3, 0, [1, 3 / 4, 1 / 4]),
    "cosine to 0.1": (ALL["cosine to 0.1"], 3, 0, [1, 0.55, 0.1]),
    "cosine, warm-up is all": (cosine, 3, 3, [1 / 3, 2 / 3, 1]),
    "wsd, one step": (wsd, 1, 0, [1]),
    "wsd": (
        partial(wsd, decay_proportion=0.5),
        8,
        2,
        [1 / 2, 1, 1, 1, 1, 1 / 2, 1 - math.sqrt(1 / 2), 1 - math.sqrt(3 / 4)],
    ),
    "wsd to 0.1": (ALL["wsd to 0.1"], 4, 0, [1, 1, 1, 1 - 0.9 * math.sqrt(1 / 2)]),
    "wsd, linear": (partial(wsd, decay="linear", decay_proportion=0.5), 8, 2, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    "wsd, cosine to 0.2": (
        partial(wsd, decay="cosine", decay_proportion=0.5, min_lr_ratio=0.2),
        8,
        2,
        [0.5, 1, 1, 1, 1, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)],
    ),
    "infinite": (
        partial(infinite, constant_lr_ratio=0.4, cooldown_proportion=0.4, decay_proportion=0.2, min_lr_ratio=0.1),
        10,
        2,
        [0.5, 1, 1, 0.7 + 0.3 * math.sqrt(0.5), 0.7, 0.7 - 0.3 * math.sqrt(0.5), 0.4, 0.4, 0.4, 0.1],
    ),
    "infinite, three steps of decay": (
        partial(infinite, constant_lr_ratio=0.8, cooldown_steps=1, decay_proportion=0.4, min_lr_ratio=0.1),
        10,
        0,
        [1, *[0.8] * 6, 0.4, 0.2, 0.1],
    ),
    "infinite, inverse_sqrt": (
        partial(infinite, constant_lr_ratio=0.5, cooldown="inverse_sqrt", cooldown_steps=2, decay_proportion=0.0),
        5,
        1,
        [1, 1, 1 - 0.5 * (1 - 6**-0.5) / (1 - 11**-0.5), 0.5, 0.5],
    ),
    "infinite, the decay comes before the end of the cooldown": (
        partial(infinite, constant_lr_ratio=0.2, cooldown_steps=8, decay_proportion=0.5, min_lr_ratio=0.1),
        8,
        0,
        [*(0.6 + 0.4 * math.cos(math.pi * i / 8) for i in range(5)), *(0.6 * (1 / 6) ** (i / 3) for i in (1, 2, 3))],
    ),
    "inverse_sqrt": (inverse_sqrt, 8, 2, [0.5, 1, *((2 / (2 + n)) ** 0.5 for n in range(6))]),
    "inverse_sqrt, timescale": (
        partial(inverse_sqrt, timescale=3),
        4,
        0,
        [1, (3 / 4) ** 0.5, (3 / 5) ** 0.5, (1 / 2) ** 0.5],
    ),
    "wsd, warm-up is all": (wsd, 2, 2, [1 / 2, 1]),
    "wsd, no decay": (partial(wsd, decay_proportion=0.0), 3, 0, [1, 1, 1]),
    "wsd, nothing but decay": (partial(wsd, decay_proportion=1.0), 2, 0, [1, 1 - math.sqrt(1 / 2)]),
}


@pytest.mark.parametrize("case", CORNERS)
def test_corners(case: str) -> None:
    function, total, warm, expected = CORNERS[case]
    values = [function(step, total_steps=total, warmup_steps=warm) for step in range(total)]
    assert values == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None)
@given(lengths=LENGTHS)
def test_every_step_trains(name: str, lengths: tuple[int, int]) -> None:
    total, warm = lengths
    assert all(ALL[name](step, total_steps=total, warmup_steps=warm) > 0 for step in range(total))


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_after_the_end_it_is_over(name: str) -> None:
    assert ALL[name](10, total_steps=10, warmup_steps=2) == pytest.approx(0, abs=1e-12)


@settings(deadline=None)
@given(total=st.integers(20, 300), more=st.integers(1, 300), step=st.integers(0, 300))
def test_infinite_is_extended_without_a_jump(total: int, more: int, step: int) -> None:
    """Up to the decay of the shorter run, both runs have the same learning rates."""
    at = partial(infinite, warmup_steps=5, cooldown_steps=6, decay_proportion=0.2)
    step = min(step, schedule.decay_from(total, 5, 0.2))
    assert at(step, total_steps=total) == at(step, total_steps=total + more)


def test_infinite_can_not_decay_upwards() -> None:
    with pytest.raises(UserError, match=r"scheduler.min_lr_ratio=0.6: above scheduler.constant_lr_ratio=0.5"):
        infinite(5, total_steps=10, warmup_steps=2, min_lr_ratio=0.6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("start_lr", [0.0, 1e-4, 4e-3])
def test_the_warm_up_starts_from_a_learning_rate(name: str, start_lr: float) -> None:
    """A base model whose last learning rate is known: the first step is one step away from it, up or down."""
    started = partial(ALL[name], start_lr=start_lr)
    run = schedule.Schedule(started, total_steps=20, warmup_steps=4, peak_lr=2e-3)
    expected = [start_lr + (2e-3 - start_lr) * share for share in (0.25, 0.5, 0.75, 1)]
    assert [2e-3 * run(step) for step in range(4)] == pytest.approx(expected)
    assert [run(step) for step in range(4, 20)] == [
        ALL[name](step, total_steps=20, warmup_steps=4) for step in range(4, 20)
    ]


def odd(step, *, total_steps, warmup_steps, value=None):
    return 1.0 if step < 3 else value


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1.0", [1.0]], ids=str)
@pytest.mark.parametrize("bound", [False, True])
def test_what_is_no_number_is_named(value: object, bound: bool) -> None:
    function = partial(odd, value=value) if bound else lambda step, **lengths: odd(step, **lengths, value=value)
    run = schedule.Schedule(function, total_steps=5, warmup_steps=0)
    assert [run(step) for step in range(3)] == [1.0, 1.0, 1.0]
    with pytest.raises(UserError, match=f"{'scheduler: odd' if bound else 'lambda>'} returns .* for step 3 of 5"):
        run(3)
