"""Ranks that no machine here has, by simulation (scripts/simulate_scale.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.mark.slow
def test_one_of_64_ranks():
    from simulate_scale import rows, same_batches

    fsdp, ddp, zero1, zero3 = rows(["tiny"], ["fsdp", "ddp", "deepspeed1", "deepspeed3"], [64])
    assert (fsdp["files"], ddp["files"], zero3["files"]) == (128, 2, 128)
    assert fsdp["static GiB"] < ddp["static GiB"] / 20  # sizes are rounded up to 512 bytes
    assert zero3["static GiB"] < zero1["static GiB"] < ddp["static GiB"]
    assert ddp["written GiB"] == ddp["checkpoint GiB"]
    assert ddp["read GiB"] == pytest.approx(ddp["checkpoint GiB"], rel=1e-3)  # step counters are not counted
    assert fsdp["checkpoint GiB"] == zero3["checkpoint GiB"] == ddp["checkpoint GiB"]
    assert fsdp["read GiB"] < fsdp["checkpoint GiB"] / 32  # of 64, with the step counters of all parameters
    assert fsdp["opened"] == 3, "its own two files, and those of rank 0 with the step counters"
    assert zero3["read GiB"] < zero3["checkpoint GiB"] / 8
    assert same_batches(64)
