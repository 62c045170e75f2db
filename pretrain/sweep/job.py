"""One job of a sweep as a folder: its name, its `job.json`, and the lock that only one process at a time can hold.

A job is identified by its overrides in any order, so that a sweep that is extended finds the jobs that are already done.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from pretrain.config.quoting import unquoted
from pretrain.runtime.console import notice
from pretrain.runtime.files import own_folder
from pretrain.runtime.folders import check_links
from pretrain.runtime.locks import Busy, Lock
from pretrain.runtime.strict_json import read_json
from pretrain.telemetry.run_file import write_json

LONGEST_NAME = 100  # characters; file systems allow 255 bytes, but names must be readable in a table
LOCK_NOTICE_SECONDS = 1.0  # before a notice that the job is locked: a job whose parent was killed may still be saving
INTERNAL_FOLDER = ".jobs"  # locks and control files, next to the folders of the jobs
DONE = ("finished", "pruned")  # statuses of jobs that are not run again
FIELD_TYPES: dict[str, tuple[type, ...]] = {  # of the fields of job.json
    "name": (str,),
    "overrides": (list,),
    "status": (str,),
    "exit_code": (int, NoneType),
    "error": (str, NoneType),
    **dict.fromkeys(("created", "seconds"), (int, float)),
}


def plain(overrides: list[str]) -> list[str]:
    """Return the overrides as users write them (``++lr=0.1`` → ``lr=0.1``), without those of the whole sweep."""
    words = [re.sub(r"^\+\+(?=[\w.]+=)", "", o) for o in overrides]
    return [w for w in words if not re.match(r"sweep(_dir|\.\w+)?=", w)]


def readable_name(overrides: list[str], keys: tuple[str, ...]) -> str:
    """Return the overrides of the swept ``keys`` as the name of a folder, such as ``lr=0.001,strategy=ddp``. Characters that
    are unsafe in a name are replaced, and long names are shortened."""
    own = [o for o in overrides if o.lstrip("+~").partition("=")[0] in keys]
    name = re.sub(r"[^\w.=+,@-]+", "_", ",".join(own)).strip("_.") or "job"
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{digest(own)}"


def digest(overrides: list[str]) -> str:
    """Return 8 hex digits that identify ``overrides`` in any order."""
    return hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class SweepJob:
    """A job of the sweep in the folder ``sweep``. ``name`` is the name of the job's folder, ``overrides`` are its overrides on
    the command line."""

    sweep: Path
    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Return the run folder: the job's own folder, unless the overrides set ``output_dir``."""
        folders = [o.partition("=")[2] for o in self.overrides if o.startswith("output_dir=")]
        return Path(os.path.expanduser(unquoted(folders[-1]))) if folders else self.sweep / self.name

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of a command line that runs only this job, also if its experiment is a sweep."""
        one = ["hydra.mode=RUN"] if any(o.lstrip("+").startswith("experiment=") for o in self.overrides) else []
        return [*self.overrides, *one]

    @property
    def error_file(self) -> Path:
        """Return the file to which a failed job writes the reason, in one line."""
        return self.sweep / INTERNAL_FOLDER / f"{self.name}.error"

    @property
    def prune_file(self) -> Path:
        """Return the file whose existence means: the trial is pruned, so the job must save and exit."""
        return self.sweep / INTERNAL_FOLDER / f"{self.name}.prune"

    def read(self) -> dict[str, Any]:
        """Return the job's state; empty if there is none."""
        return _read(self.sweep / self.name)

    def write(self, **changes: Any) -> None:
        """Update job.json with ``changes``; create it if needed."""
        file = self.sweep / self.name / "job.json"
        check_links(self.sweep, "sweep_dir", [self.name])
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = {"name": self.name, "overrides": list(self.overrides), "created": time.time(), "status": "waiting"}
        fresh |= {"exit_code": None, "error": None, "seconds": 0.0}
        write_json(file, fresh | self.read() | changes)

    def lock(self) -> Lock | None:
        """Acquire the job's lock. Return ``None`` if another process holds it.

        A child that inherits the lock still holds it after its parent was killed, because then the job is still running.
        """
        return lock_of(self.sweep, f"{self.name}.lock", wait=False)

    @contextmanager
    def exclusive(self) -> Iterator[Lock]:
        """Wait until no other process runs this job, and hold its lock."""
        deadline = time.monotonic() + LOCK_NOTICE_SECONDS
        reported = False
        while (held := self.lock()) is None:
            if not reported and time.monotonic() > deadline:
                notice(f"{self.name}: another command is running it; waiting")
                reported = True
            time.sleep(0.1)
        try:
            yield held
        finally:
            held.release()


def lock_of(sweep: Path, name: str, *, wait: bool = True) -> Lock | None:
    """Acquire the lock ``name`` in the sweep's folder. With ``wait=False`` return ``None`` if another process holds it."""
    sweep.mkdir(parents=True, exist_ok=True)
    folder = own_folder(sweep / INTERNAL_FOLDER)
    try:
        return Lock(folder / name).acquire(timeout=None if wait else 0)
    except Busy:
        return None


@contextmanager
def folder_lock(sweep: Path) -> Iterator[None]:
    """Hold the sweep's lock for a short time, to create a job's folder or to rewrite the table."""
    held = lock_of(sweep, "table.lock")
    assert held is not None
    try:
        yield
    finally:
        held.release()


def jobs_in(sweep: Path) -> list[tuple[SweepJob, dict[str, Any]]]:
    """Return every job of a sweep folder with its state, in the order in which they were created. Runs that ``resume=never``
    has moved aside are not included."""
    found = []
    for file in sweep.glob("*/job.json"):
        state = _read(file.parent)
        if state.get("name") == file.parent.name:
            found.append((SweepJob(sweep, state["name"], tuple(state["overrides"])), state))
    return sorted(found, key=lambda job: (job[1]["created"], job[0].name))


def job_of(sweep: Path, overrides: list[str], keys: tuple[str, ...]) -> SweepJob:
    """Return the job with these overrides. If there is none yet, create it in a new folder."""
    words = plain(overrides)
    with folder_lock(sweep):
        known = {tuple(sorted(job.overrides)): job for job, _ in jobs_in(sweep)}
        if found := known.get(tuple(sorted(words))):
            return found
        name = readable_name(words, keys)
        # Another job can have this name if they differ in keys that are not swept, or in characters that were replaced.
        if os.path.lexists(sweep / name):
            name = f"{name}-{digest(words)}"
        job = SweepJob(sweep, name, tuple(words))
        job.write()
        return job


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "job.json"
    if not os.path.lexists(file):
        return {}
    with suppress(OSError, ValueError):
        state = read_json(file)
        if _is_state(state):
            return dict(state)
    _notice_once(f"{file}: not a valid job state; the job is ignored")
    return {}


def _is_state(content: Any) -> bool:
    if not isinstance(content, dict) or not all(type(content.get(key)) in kinds for key, kinds in FIELD_TYPES.items()):
        return False
    numbers = [value for value in content.values() if isinstance(value, float)]
    return all(map(math.isfinite, numbers)) and all(isinstance(word, str) for word in content["overrides"])


@cache  # report a message once, although the folders are read again for every table
def _notice_once(message: str) -> None:
    notice(message)
