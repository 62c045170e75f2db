"""Ranks that no machine here has, by simulation (scripts/simulate_scale.py)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.mark.slow
def test_one_of_64_ranks():
    from simulate_scale import rows, same_batches

    fsdp, ddp = rows(["tiny"], ["fsdp", "ddp"], [64])
    assert fsdp["files"] == 128
    assert ddp["files"] == 2
    assert fsdp["static GiB"] < ddp["static GiB"] / 20  # sizes are rounded up to 512 bytes
    assert fsdp["checkpoint GiB"] == pytest.approx(64 * fsdp["written GiB"])
    assert ddp["written GiB"] == ddp["checkpoint GiB"]
    assert same_batches(64)
