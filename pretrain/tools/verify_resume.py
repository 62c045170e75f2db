"""Check that a run that is killed and resumed equals the uninterrupted run, with your model, data and strategy.

    python -m pretrain.tools.verify_resume model_name=path/to/model dataset=local dataset.nameOrPath=books/ strategy=fsdp
    python -m pretrain.tools.verify_resume --config run.yaml

The arguments are those of a run; max_steps, save_every, evaluate_every and output_dir are set by this program. The run is
made twice in a temporary folder: once with N steps without interruption; and once with all its processes killed (SIGKILL)
after N/2 steps, two steps after its last checkpoint, and then resumed by the same command. Both runs are compared: weights,
moments, hooks, random states, data cursor, progress, guard and loss scaler of the last checkpoint; the records of metrics.jsonl;
and, on every rank, the tokens of every step.

difference: the largest absolute difference of all numbers. On a CPU it is 0. Some kernels of GPUs add in no fixed order:
--bound sets what difference of weights, moments and records is accepted.

Exit code 0: no difference; 1: a difference, or a run failed, or this program was stopped; 2: a mistake.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.runtime.python import module_command
from pretrain.telemetry.record import is_clock
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.tools.arguments import tool_parser

OWN = ["resume=auto", "log_every=1", "sink=[jsonl]"]
PLACES = {"folder", "model", "path"}
# A resumed run has more starts, and it may be killed before the record of a checkpoint is written.
COMPARED = ("train", "evaluation", "sample", "run_finished")
DATA_ORDER = Path(__file__).parent / "data_order"


class Difference(NamedTuple):
    """The largest absolute difference of two runs in one respect, and where it is. It is infinite for
    what only one of them has."""

    largest: float
    where: str = ""


# -- comparing two finished runs ----------------------------------------------------------------------------------------


def compare(run: Path, reference: Path) -> dict[str, Difference]:
    """Return how ``run`` differs from ``reference`` in its last checkpoint and its records, by what is compared."""
    from pretrain.checkpoint.store import KINDS, load

    ours, theirs = (load(last_checkpoint(folder)) for folder in (run, reference))
    found = {}
    for kind, name in zip(KINDS, ("weights", "moments", "hooks"), strict=True):
        found[name] = _worst(_tensors(ours["engine"][kind], theirs["engine"][kind]))
    found["hooks"] = max(found["hooks"], _worst(_values(ours.get("hooks"), theirs.get("hooks"))))
    found["random states"] = _worst(_values(ours["rng"], theirs["rng"]))
    found["data cursor"] = _worst(_values(ours["loader"], theirs["loader"]))
    found["progress"] = _worst(_values(ours["progress"], theirs["progress"]))
    found["guard"] = _worst(_values(ours.get("guard"), theirs.get("guard")))
    found["loss scaler"] = _worst(_values(ours["engine"]["scaler"], theirs["engine"]["scaler"]))
    found["metrics"] = _worst(_values(records(run), records(reference)))
    return found


def last_checkpoint(run: Path) -> Path:
    """Return the last complete checkpoint of ``run``."""
    newest = newest_checkpoint(run)
    if newest is None:
        raise SystemExit(f"{run} has no complete checkpoint")
    return newest


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of ``run``, if there is one."""
    from pretrain.checkpoint.store import CheckpointStore

    return CheckpointStore(run / "checkpoints").newest()


def records(run: Path) -> list[dict[str, Any]]:
    """Return the records that an uninterrupted run must have as well, without times and paths."""
    every = read_records(run / "metrics.jsonl")
    kept = [r for r in every if r["event"] in COMPARED and r.get("status", "finished") == "finished"]
    return [{key: value for key, value in r.items() if key not in PLACES and not is_clock(key)} for r in kept]


def trained_on(notes: Path) -> dict[str, list[str]]:
    """Return the hash of the tokens of every rank and step. A step that was trained again on other tokens has several."""
    found: dict[str, set[str]] = {}
    for file in notes.glob("rank-*"):
        for step, digest in map(str.split, file.read_text().splitlines()):
            found.setdefault(f"{file.name}, step {step}", set()).add(digest)
    assert found, "a run has steps"
    return {name: sorted(digests) for name, digests in sorted(found.items())}


def _tensors(ours: Any, theirs: Any) -> Iterator[Difference]:
    import torch

    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours.keys() & theirs.keys() or ours.shape(name) != theirs.shape(name):
            yield Difference(float("inf"), name)
            continue
        a, b = ours.read(name), theirs.read(name)
        if not torch.equal(a, b):
            apart = torch.where(a == b, 0.0, (a.double() - b.double()).abs()).nan_to_num(nan=float("inf"))
            yield Difference(float(apart.max()), name)


def _values(a: Any, b: Any, where: str = "") -> Iterator[Difference]:
    """Yield the differences of two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _values(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _values(x, y, f"{where}[{i}]")
    elif isinstance(a, int | float) and isinstance(b, int | float):
        if a != b:
            yield Difference(float("inf") if math.isnan(a - b) else abs(a - b), where)
    elif a != b:
        yield Difference(float("inf"), where)


def _worst(differences: Iterator[Difference]) -> Difference:
    return max(differences, default=Difference(0.0))


# -- making them ----------------------------------------------------------------------------------------------------------


@contextmanager
def started(arguments: list[str], run: Path, log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start the run as a process group of its own, whose output is appended to ``log``. At the end, processes of it that are
    still alive are killed."""
    command = [*module_command("pretrain"), *arguments, *OWN, f"output_dir={run}"]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill(process)


def make(arguments: list[str], run: Path, log: Path, **options: Any) -> None:
    """Make a run, which must succeed."""
    with started(arguments, run, log, **options) as process:
        finish(process, log)


def recording(notes: Path) -> dict[str, str]:
    """Return the environment of a run that records in the new folder ``notes`` what it trains on."""
    notes.mkdir()
    path = os.pathsep.join(filter(None, (str(DATA_ORDER), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PRETRAIN_DATA_ORDER": str(notes)}


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a run, which must succeed. Otherwise exit with 2 for a mistake of the user, else with 1."""
    code = process.wait()
    if code:
        last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        print(f"{last_lines}\nthe run ended with exit code {code}", file=sys.stderr)
        raise SystemExit(2 if code == 2 else 1)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to every process of the run that is still alive."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_after(process: subprocess.Popen[bytes], run: Path, step: int, log: Path) -> None:
    """Kill the run when it has trained ``step`` steps and a checkpoint, which is written in the background, is complete."""
    newest_checkpoint(run)  # imports torch now, and not when the run has come so far

    def far_enough() -> bool:
        trained = any(r["event"] == "train" and r["step"] >= step for r in _so_far(run))
        return trained and newest_checkpoint(run) is not None

    while not far_enough():
        if process.poll() is not None:
            finish(process, log)
            raise SystemExit(f"the run ended before it could be killed after {step} steps")
        time.sleep(0.01)
    kill(process)


def _so_far(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return read_records(path) if path.exists() else []


def show(found: dict[str, Difference], bound: float) -> bool:
    """Print what differs; return whether nothing differs by more than is accepted."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("compared", "difference", "equal", "where", box=box.SIMPLE)
    good = {}
    for name, difference in found.items():
        accepted = bound if name in ("weights", "moments", "metrics") else 0.0
        good[name] = difference.largest <= accepted
        where = difference.where if difference.largest else ""
        table.add_row(name, f"{difference.largest:g}", "yes" if good[name] else "NO", where)
    Console().print(table)
    return all(good.values())


def verify() -> bool:
    """Make both runs and print how they differ; return whether they are equal."""
    parser = tool_parser("verify_resume", __doc__)
    parser.add_argument("--steps", type=int, default=12, help="N (default 12)")
    parser.add_argument("--bound", type=float, default=0.0, help="accepted difference (default 0)")
    asked, given = parser.parse_known_args()
    if asked.steps < 6:
        parser.error(f"--steps {asked.steps}: at least 6, for a checkpoint before the middle")
    half = asked.steps // 2
    arguments = [*given, f"max_steps={asked.steps}", f"save_every={half - 2}", f"evaluate_every={half}"]
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as scratch:
        whole, killed, log = Path(scratch, "whole"), Path(scratch, "killed"), Path(scratch, "log")
        notes = {run: run.with_suffix(".notes") for run in (whole, killed)}
        environments = {run: recording(folder) for run, folder in notes.items()}
        print(f"{asked.steps} steps without interruption …", flush=True)
        make(arguments, whole, log, env=environments[whole])
        print(f"again, killed after step {half} …", flush=True)
        with started(arguments, killed, log, env=environments[killed]) as process:
            kill_after(process, killed, half, log)
        print("resumed by the same command …", flush=True)
        make(arguments, killed, log, env=environments[killed])
        resumed = [r["step"] for r in read_records(killed / "metrics.jsonl") if r["event"] == "run_started"][-1]
        facts = json.loads((killed / "run.json").read_text())
        print(f"{facts['strategy']}, {facts['world_size']} process(es), {facts['device']}; resumed from step {resumed}")
        order = _worst(_values(trained_on(notes[killed]), trained_on(notes[whole])))
        return show(compare(killed, whole) | {"data order": order}, asked.bound)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        equal = verify()
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    print("equal" if equal else "NOT equal")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
