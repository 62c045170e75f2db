"""sweep.json: every job of a sweep folder with its results. The file is created again from the jobs' folders each time.

Jobs that are no longer part of the command stay in the table, so that it lists everything that was tried in the folder.
"""

from __future__ import annotations

import json
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.runtime.errors import UserError
from pretrain.runtime.files import replace_file
from pretrain.sweep.job import SweepJob, folder_lock, jobs_in, lock_of
from pretrain.sweep.measure import measures_of, objective_in, pareto, ranking
from pretrain.sweep.page import page
from pretrain.telemetry.run_file import write_json

COMMAND_LOCK = "command.lock"  # a sweep command holds it until it exits


def write(
    folder: Path, *, command: str, metric: str, direction: str, status: str = "running", with_page: bool = True
) -> dict[str, Any]:
    """Rewrite sweep.json and (``with_page``) sweep.html. Return the table.

    Any process of the sweep can call this at any time; a lock serialises the calls, and each reads all jobs' folders.
    """
    with folder_lock(folder):
        table = collect(folder, command=command, metric=metric, direction=direction, status=status)
        write_json(folder / "sweep.json", table)
        if with_page:
            replace_file(folder / "sweep.html", page(folder, table))
    return table


def read(folder: Path) -> dict[str, Any]:
    """Return the current table of a sweep folder, with the metric of its last command.

    Raises ``UserError`` if the folder is not a sweep folder.
    """
    try:
        saved = json.loads((folder / "sweep.json").read_text())
        facts = {"command": saved["command"], "metric": saved["metric"]["name"], "status": saved["status"]}
        facts["direction"] = saved["metric"]["direction"]
    except OSError:
        raise UserError(f"{folder}: not a sweep folder: it has no sweep.json") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'sweep.json'} can't be read: {type(error).__name__}: {error}") from None
    if facts["status"] == "running" and not _held(folder, COMMAND_LOCK):
        facts["status"] = "stopped"
    return collect(folder, **facts)


def collect(folder: Path, *, command: str, metric: str, direction: str, status: str) -> dict[str, Any]:
    """Return the table, read from the jobs' folders. Jobs are numbered in the order in which they were created."""
    rows = [_row(number, job, state, metric) for number, (job, state) in enumerate(jobs_in(folder))]
    ranked = ranking(rows, direction)
    return {
        "command": command,
        "status": status,
        "metric": {"name": metric, "direction": direction},
        "jobs": rows,
        "best": ranked[0]["number"] if ranked else None,
        "pareto": pareto(rows),
    }


def _row(number: int, job: SweepJob, state: dict[str, Any], metric: str) -> dict[str, Any]:
    measures = measures_of(job.folder)
    status = state["status"]
    if status == "running" and state.get("locked") and not _held(job.sweep, f"{job.name}.lock"):
        status = "stopped"  # it was killed, so that it could not write its status
    return {
        "number": number,
        "name": job.name,
        "overrides": list(job.overrides),
        "folder": os.path.relpath(job.folder, job.sweep),
        "status": status,
        "exit_code": state["exit_code"],
        "error": state["error"],
        "objective": objective_in(measures, metric) if status in ("finished", "pruned") else None,
        "new_loss": measures["new_loss"],
        "new_delta": measures["new_delta"],
        "forgetting": measures["forgetting"],
        "tokens_per_second": measures["tokens_per_second"],
        "seconds": state["seconds"],
        "results": measures["results"],
        "command": shlex.join(["python", "-m", "pretrain", *job.arguments]),
    }


def _held(folder: Path, lock: str) -> bool:
    with suppress(OSError):  # a read-only folder of another user
        held = lock_of(folder, lock, wait=False)
        if held is None:
            return True
        held.release()
    return False
