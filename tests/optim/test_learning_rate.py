"""The peak by the model's size, and what a longer run does to the learning rate."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.optim.learning_rate import change, peak_lr, rate, stable_until, with_lr


@pytest.mark.parametrize(
    ("parameters", "lr"),
    [
        (1_642_112, 1e-3),
        (29_999_999, 1e-3),
        (30_000_000, 3e-4),
        (134_515_008, 3e-4),
        (1_100_000_000, 2e-4),
        (7_000_000_000, 1.2e-4),
        (70_000_000_000, 6e-5),
    ],
)
def test_the_peak_falls_with_the_size(parameters: int, lr: float) -> None:
    assert peak_lr(parameters) == lr


def test_auto_is_replaced_wherever_it_has_gone() -> None:
    config = {"lr": "auto", "optimizer": {"_target_": "x", "lr": "auto"}}
    assert with_lr(config, 0.5) == {"lr": 0.5, "optimizer": {"_target_": "x", "lr": 0.5}}
    own = {"lr": "auto", "optimizer": {"lr": 0.1}}
    assert with_lr(own, 0.5) == {"lr": 0.5, "optimizer": {"lr": 0.1}}
    nested = {"lr": "auto", "optimizer": {"adam_lr": "auto", "foreach": "auto", "parts": [{"lr": "auto"}, {"lr": 0.1}]}}
    parts = [{"lr": 0.5}, {"lr": 0.1}]
    assert with_lr(nested, 0.5)["optimizer"] == {"adam_lr": 0.5, "foreach": "auto", "parts": parts}
    assert with_lr({"lr": 0.1, "optimizer": {"lr": 0.1}}, 0.5) == {"lr": 0.1, "optimizer": {"lr": 0.1}}
    assert config["lr"] == "auto"


def run(name: str, lr: float = 1e-3, **options: Any) -> dict[str, Any]:
    node = {"_target_": f"pretrain.optim.schedule.{name}", "_partial_": True, **options}
    return {"lr": lr, "warmup_proportion": 0.0, "scheduler": node}


COSINE = run("cosine", min_lr_ratio=0.1)
WSD = run("wsd", min_lr_ratio=0.0, decay_proportion=0.2)


@pytest.mark.parametrize(
    ("old", "old_steps", "new", "new_steps", "step", "expected"),
    [
        (COSINE, 101, COSINE, 201, 101, (1e-4, 1e-3 * (0.1 + 0.45 * (1 - 0.0157073)))),
        (WSD, 100, WSD, 200, 100, (1e-3 * (1 - (19 / 20) ** 0.5), 1e-3)),
        (COSINE, 101, COSINE, 101, 50, None),
        (COSINE, 101, COSINE, 102, 2, None),  # hardly noticeable
        (WSD, 100, WSD, 200, 50, None),  # before the decay
        (run("inverse_sqrt"), 100, run("inverse_sqrt"), 200, 100, None),
        (run("infinite", cooldown_steps=20), 100, run("infinite", cooldown_steps=20), 200, 84, None),
        (run("infinite"), 100, run("infinite"), 200, 100, (1e-4, 5e-4)),
        (run("constant"), 100, run("constant"), 200, 100, None),
        (COSINE, 101, run("constant"), 101, 101, (1e-4, 1e-3)),
        (run("constant"), 100, run("constant", 1e-4), 100, 50, (1e-3, 1e-4)),
        (COSINE | {"scheduler": {"_target_": "theirs.schedule"}}, 101, COSINE, 201, 101, None),
        (COSINE | {"lr": "high"}, 101, COSINE, 201, 101, None),
        ({}, 101, COSINE, 201, 101, None),
    ],
)
def test_leaving_the_curve(old, old_steps, new, new_steps, step, expected) -> None:
    found = change(old, old_steps, new, new_steps, step=step)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-6))


def test_rate_is_that_of_the_schedule() -> None:
    assert rate(COSINE, total_steps=101, step=50) == pytest.approx(0.55e-3)
    assert rate(COSINE | {"warmup_proportion": 0.1}, total_steps=100, step=0) == pytest.approx(1e-4)
    started = run("constant", start_lr=5e-4) | {"warmup_proportion": 0.1}
    assert rate(started, total_steps=100, step=4) == pytest.approx(7.5e-4)


def test_a_config_of_another_shape_calls_nothing() -> None:
    for scheduler in (
        None,
        3,
        [],
        {"_target_": "os.system", "command": "x"},
        {"_target_": "pretrain.optim.schedule.warmup"},
    ):
        assert rate(COSINE | {"scheduler": scheduler}, total_steps=100, step=1) is None


def test_where_a_run_can_be_extended_from() -> None:
    assert stable_until(WSD, 100) == 80
    assert stable_until(run("infinite"), 100) == 85, "its default is the function's"
    assert stable_until(COSINE, 100) is None
