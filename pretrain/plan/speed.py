"""The time of a run: from the operations per token and a share of the peak FLOP/s, or from what an earlier run has measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.plan.devices import Device


@dataclass(frozen=True)
class Speed:
    """The speed of all devices together. A number that is not known is ``None``; none is guessed.

    Attributes:
        flops_per_token: operations per training token, forward and backward.
        flops_unknown: why they are not known.
        peak_flops: peak FLOP/s of one device.
        mfu: share of the peak that is assumed.
        source: where ``mfu`` or ``tokens_per_second`` are from: ``plan.mfu``, or the folder of a run.
        tokens_per_second: target tokens per second.
        steps: optimizer steps.
        steps_source: where ``steps`` are from.
        tokens: tokens of all steps.
        hours: time of all steps.
    """

    flops_per_token: float | None = None
    flops_unknown: str | None = None
    peak_flops: float | None = None
    mfu: float | None = None
    source: str | None = None
    tokens_per_second: float | None = None
    steps: int | None = None
    steps_source: str | None = None
    tokens: int | None = None
    hours: float | None = None


def planned_speed(
    config: RunConfig, hf: Any, *, device: Device, devices: int, steps: tuple[int | None, str | None], global_batch: int
) -> Speed:
    """Return the speed of a run of ``steps`` (and where their number is from) on ``devices`` devices."""
    from pretrain.models.flops import Flops, flops_per_token

    flops = Flops(unknown="the operations of transformed models are not counted")
    if not config.transforms:
        flops = flops_per_token(hf, config.sequence_length)
    peak = config.telemetry.peak_flops or device.peak_flops(config.precision.products)
    measured = measured_by(Path(config.output_dir), config, device=device, devices=devices)
    mfu, rate, source = config.plan.mfu, None, None
    if mfu is not None:
        source = "plan.mfu"
    elif measured is not None:
        mfu, rate, source = measured.get("mfu"), measured.get("tokens_per_second"), config.output_dir
    if rate is None and mfu is not None and peak is not None and flops.causal is not None:
        rate = mfu * peak * devices / flops.causal
    tokens = None if steps[0] is None else steps[0] * global_batch * config.sequence_length
    hours = tokens / rate / 3600 if tokens is not None and rate else None
    return Speed(flops.causal, flops.unknown, peak, mfu, source, rate, *steps, tokens, hours)


def measured_by(folder: Path, config: RunConfig, *, device: Device, devices: int) -> dict[str, Any] | None:
    """Return ``tokens_per_second`` and ``mfu`` of the run in ``folder``, if it has the same model, sequences and devices."""
    from pretrain.telemetry.history import History
    from pretrain.telemetry.report.folder import RECORDS
    from pretrain.telemetry.run_file import read_run_file
    from pretrain.telemetry.sinks.jsonl import iter_records

    facts = read_run_file(folder)
    same = {
        "name": facts.get("name"),
        "device": device.driver_name,
        "devices": devices,
        "sequence_length": config.sequence_length,
        "precision": config.precision.name,
    }
    driver = str(facts.get("device", "")).removeprefix("NVIDIA ")
    if not facts or any(facts.get(key) != value for key, value in same.items() if key not in ("device", "name")):
        return None
    if driver != device.driver_name.removeprefix("NVIDIA "):
        return None
    try:
        history = History(iter_records(folder / RECORDS), on_invalid=lambda number, error: None)
    except (OSError, ValueError):
        return None
    end, train = history.end or {}, history.last_train
    rate = end.get("tokens_per_second") or train.get("tokens_per_second_run") or train.get("tokens_per_second")
    mfu = end.get("mfu") if end.get("mfu") is not None else train.get("mfu")
    return None if rate is None else {"tokens_per_second": rate, "mfu": mfu}
