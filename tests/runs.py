"""What tests ask of whole runs: their records without clocks, whether two are the same, how far one has come."""

import json
import time
from itertools import zip_longest
from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain.telemetry.jsonl import read_records
from pretrain.telemetry.record import is_clock

PLACES = {"path", "folder", "model"}


def numbers(run: Path) -> list[dict]:
    """The records without clocks and places. Left out: starts and stops, of which a resumed run has more, and
    checkpoints, whose record a kill can come before."""
    kept = ("train", "evaluation", "sample", "run_finished")
    return [
        {k: v for k, v in record.items() if k not in PLACES and not is_clock(k)}
        for record in read_records(run / "metrics.jsonl")
        if record["event"] in kept and record.get("status") != "stopped"
    ]


def assert_same_numbers(run: Path, reference: Path) -> None:
    """The first record that differs, said as it is."""
    for ours, theirs in zip_longest(numbers(run), numbers(reference)):
        assert ours == theirs


def assert_same_run(run: Path, reference: Path) -> None:
    assert_same_numbers(run, reference)
    assert_same_checkpoint(run, reference)


def assert_same_checkpoint(run: Path, reference: Path) -> None:
    """Of one process or several, whose weights and moments may lie in many files."""
    names = [file.name for file in (reference / "checkpoints/step-00000020").glob("*.safetensors")]
    assert len(names) >= 2
    for name in names:
        ours, theirs = (load_file(r / "checkpoints/step-00000020" / name) for r in (run, reference))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    state, expected = (
        json.loads((r / "checkpoints/step-00000020/state.json").read_text().replace(str(r), ""))
        for r in (run, reference)
    )
    assert state | {"records": []} == expected | {"records": []}, "apart from their clocks the records are above"


def wait_for(run: Path, step: int, process) -> None:
    """Until metrics.jsonl has a record of ``step``."""
    while process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and any(r["step"] >= step and r["event"] == "train" for r in read_records(path)):
            return
        time.sleep(0.005)
