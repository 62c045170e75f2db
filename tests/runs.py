"""What tests ask of whole runs: their records without clocks, whether two are the same, how far one has come."""

import json
import os
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

import torch

from pretrain.checkpoint.store import KINDS, load
from pretrain.telemetry.record import is_clock
from pretrain.telemetry.sinks.jsonl import read_records

ROOT = Path(__file__).parents[1]
PLACES = {"path", "folder", "model"}


def run_code(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """What a process ends with that runs ``code`` with the words ``arguments``, and imports what it needs itself."""
    command, env = [sys.executable, "-c", code, *arguments], os.environ | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def numbers(run: Path) -> list[dict]:
    """The records without clocks and places. Left out: starts and stops, of which a resumed run has more, and
    checkpoints, whose record a kill can come before."""
    kept = ("train", "evaluation", "positions", "sample", "run_finished")
    return [
        {k: v for k, v in record.items() if k not in PLACES and not is_clock(k)}
        for record in read_records(run / "metrics.jsonl")
        if record["event"] in kept and record.get("status", "finished") == "finished"
    ]


def starts(run: Path) -> list[tuple[int, bool]]:
    """Of every start that its records know: the step, and whether it went on from a checkpoint."""
    return [(r["step"], r["resumed"]) for r in read_records(run / "metrics.jsonl") if r["event"] == "run_started"]


def losses(run: Path) -> list[float]:
    """Of every step that was trained."""
    return [r["loss"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]


def assert_same_numbers(run: Path, reference: Path) -> None:
    """The first record that differs, said as it is."""
    for ours, theirs in zip_longest(numbers(run), numbers(reference)):
        assert ours == theirs


def assert_same_run(run: Path, reference: Path) -> None:
    assert_same_numbers(run, reference)
    assert_same_checkpoint(run, reference)


def assert_same_checkpoint(run: Path, reference: Path) -> None:
    """Of one process or several, whose weights and moments may lie in many files."""
    last = max(folder.name for folder in (reference / "checkpoints").glob("step-*[0-9]"))
    engines = [load(r / "checkpoints" / last)["engine"] for r in (run, reference)]
    for kind in KINDS:
        ours, theirs = (engine[kind] for engine in engines)
        assert ours.keys() == theirs.keys()
        for key in sorted(ours.keys()):
            assert torch.equal(ours.read(key), theirs.read(key)), key
    state, expected = (
        json.loads((r / "checkpoints" / last / "state.json").read_text().replace(str(r), "")) for r in (run, reference)
    )
    assert state | {"records": []} == expected | {"records": []}, "apart from their clocks the records are above"


def wait_for(run: Path, step: int, process) -> None:
    """Until metrics.jsonl has a record of ``step``."""
    while process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and any(r["step"] >= step and r["event"] == "train" for r in read_records(path)):
            return
        time.sleep(0.005)


def kill_and_resume(arguments, run: Path, command, spawn, *, at: int) -> None:
    """Kill the run of ``arguments`` with SIGKILL once it has done step ``at``, and start the same command again."""
    words = [*arguments, f"output_dir={run}"]
    process = spawn(words)
    wait_for(run, at, process)
    process.kill()
    process.wait()
    code, _, err = command(words)
    assert code == 0, err


def injected(tmp_path, lines):
    """The environment of a process whose Python does ``lines`` first."""
    folder = tmp_path / "injected"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(lines)
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def at_call(where, fault, mark, *, at=1, after=False, rank="0", paths=""):
    """The environment of a run to which ``fault`` (kill · kill all · hang) happens once, with the file ``mark`` to show for it.

    ``where``: ``module:function``; it is the call number ``at`` of the process ``rank``, counted among those that have a path
    among their arguments in which ``paths`` is found; before or ``after`` the function has done its work.
    """
    module, function = where.split(":")
    order = {"module": module, "function": function, "fault": fault, "mark": str(mark), "at": at, "after": after}
    path = f"{ROOT / 'tests/injected'}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": path, "PRETRAIN_FAULT": json.dumps(order | {"rank": rank, "paths": paths})}
