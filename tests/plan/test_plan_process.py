"""A run that is planned by another process at its start."""

import json

import pytest

from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.telemetry.sinks.terminal_tables import planned_memory


@pytest.mark.slow
def test_a_run_says_what_it_expects(base_arguments, tmp_path, command):
    words = [*base_arguments, f"output_dir={tmp_path}", "max_steps=2", "plan.at_start=true", "evaluate_every=null"]
    code, out, err = command(words)
    assert code == 0, err
    facts = json.loads((tmp_path / "run.json").read_text())
    assert 0 < facts["planned_memory_gib"] < 0.1
    assert facts["device_memory_gib"] is None
    started = next(r for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "run_started")
    assert started["planned_memory_gib"] == facts["planned_memory_gib"]
    assert out.count("GiB of tensors") == 2, "in the first lines and at the end"
    code, out, _ = command(["task=plan", *words, f"output_dir={tmp_path / 'plan'}", "plan.device=cpu"])
    assert code == 0
    planned = json.loads((tmp_path / "plan/plan.json").read_text())
    assert planned["peak_bytes"] / 2**30 == facts["planned_memory_gib"]


def test_a_run_without_a_plan_says_nothing():
    assert planned_memory({"event": "run_started"}) is None
    assert planned_memory({"planned_memory_gib": 41.23, "device_memory_gib": 79.6}) == "41.2 GiB of 80"
