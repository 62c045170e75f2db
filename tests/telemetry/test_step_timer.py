"""The clock of a step's parts: by the host on a CPU, by events in the stream on a GPU."""

import time

import pytest
import torch

from pretrain.telemetry.events import StepDone
from pretrain.telemetry.step_timer import StepTimer, StepTimes
from pretrain.telemetry.window import Window


def test_parts_add_up_and_are_taken_once():
    clock = StepTimer()
    started_at = time.perf_counter()
    for _ in range(2):
        with clock.part("data"):
            time.sleep(0.01)
    with clock.part("compute"):
        time.sleep(0.02)
    took = time.perf_counter() - started_at
    seconds = clock.take().seconds()
    assert 0.02 <= seconds["data"] <= took
    assert 0.02 <= seconds["compute"] <= took - seconds["data"]
    assert seconds["optimizer"] == seconds["communication"] == 0.0
    assert sum(clock.take().seconds().values()) == 0.0


class Event:
    """As a device's: how far it is from another can be asked once the device has passed both. Milliseconds."""

    def __init__(self, at: float) -> None:
        self.at, self.passed = at, False

    def synchronize(self) -> None:
        self.passed = True

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, later: "Event") -> float:
        assert later.passed, "asked before the device was there"
        return later.at - self.at


def test_events_are_waited_for_and_told_in_seconds():
    spans = (("compute", Event(0.0), Event(1500.0)), ("compute", Event(2000.0), Event(2500.0)))
    times = StepTimes((*spans, ("data", Event(1500.0), Event(2000.0))), on_device=True)
    assert not any(event.passed for _, *events in times.spans for event in events)
    assert times.seconds() == {"data": 0.5, "communication": 0.0, "compute": 2.0, "optimizer": 0.0}


def test_times_of_steps_that_are_over_are_folded_and_no_other_is_waited_for():
    window = Window()
    steps = [StepTimes((("compute", Event(0.0), Event(1000.0 * n)),), on_device=True) for n in (1, 2, 3)]
    tensors = {"loss": torch.ones(()), "grad_norm": torch.ones(()), "skipped": torch.zeros(())}
    for number, times in enumerate(steps, start=1):
        if number == 3:
            steps[0].spans[0][2].passed = True
        window.add(StepDone(number, epoch=0.0, tokens=1, step_tokens=1, lr=0.1, times=times, **tensors))
    assert list(window._times) == steps[1:]
    assert not any(times.over() for times in steps[1:])
    assert window.split()["compute_seconds"] == pytest.approx(2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and `pytest -m gpu`")
def test_a_gpu_is_timed_without_being_waited_for():
    clock, matrix = StepTimer(on_device=True), torch.randn(4096, 4096, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with clock.part("compute"):
            for _ in range(50):
                matrix = (matrix @ matrix) / 64
        times = clock.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds = times.seconds()  # waits
    assert seconds["compute"] > 50 * 2 * 4096**3 / 1e15, "no GPU does these products any faster"
