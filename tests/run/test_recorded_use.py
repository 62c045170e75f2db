"""The runs below a folder, which keep their datasets from being deleted; the command: data/test_cache_tool.py."""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.run.recorded_use import RecordedUse


def record(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").write_text(json.dumps(names))


def test_runs_are_found_below_folders_of_any_name_and_behind_links(tmp_path: Path) -> None:
    """One of the links is a cycle. What is in a run is no other run."""
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    record(runs / "models/logs/a", "one")
    record(elsewhere / "checkpoints/b", "two", "three")
    record(runs / "c")
    record(runs / "c/checkpoints", "four")
    (runs / "d/logs").mkdir(parents=True)
    (runs / "d/.run_id").touch()
    record(runs / "d/logs/e", "five")
    (runs / "link").symlink_to(elsewhere)
    (elsewhere / "cycle").symlink_to(runs)
    found = RecordedUse.below([runs, runs / "models"]).datasets
    assert found == {
        runs / "models/logs/a": {"one"},
        runs / "link/checkpoints/b": {"two", "three"},
        runs / "c": frozenset(),
    }
