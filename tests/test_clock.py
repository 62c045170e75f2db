"""The clock of a step's parts: by the host on a CPU, by events in the stream on a GPU."""

import time

import pytest
import torch

from pretrain.clock import StepClock


def test_parts_add_up_and_are_taken_once():
    clock = StepClock()
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_without_being_waited_for():
    clock, matrix = StepClock(on_device=True), torch.randn(4096, 4096, device="cuda")
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
