"""One job of a sweep as a folder: what it is called, its `job.json`, and the lock that only one command can hold.

A job is known by its overrides, whatever their order: a sweep that has grown finds the jobs it has already done.
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
from pretrain.runtime.folders import check_links
from pretrain.runtime.locks import Busy, Lock
from pretrain.runtime.safe_files import own_folder
from pretrain.runtime.strict_json import read_json
from pretrain.telemetry.run_file import write_json

LONGEST_NAME = 100  # characters; file systems allow 255 bytes, and people read them in a table
PATIENCE_SECONDS = 1.0  # a job whose parent was killed may still be saving
KEPT = ".jobs"  # the folder of locks, beside those of the jobs
DONE = ("finished", "pruned")  # what is not run again
TYPES: dict[str, tuple[type, ...]] = {  # of job.json
    "name": (str,),
    "overrides": (list,),
    "status": (str,),
    "exit_code": (int, NoneType),
    "error": (str, NoneType),
    **dict.fromkeys(("created", "seconds"), (int, float)),
}


def plain(overrides: list[str]) -> list[str]:
    """``++lr=0.1`` → ``lr=0.1``, as people write it, and without what belongs to the sweep as a whole."""
    words = [re.sub(r"^\+\+(?=[\w.]+=)", "", o) for o in overrides]
    return [w for w in words if not re.match(r"sweep(_dir|\.\w+)?=", w)]


def readable_name(overrides: list[str], keys: tuple[str, ...]) -> str:
    """``lr=0.001,strategy=ddp``: the overrides of the swept ``keys``, safe as the name of a folder and not too long."""
    own = [o for o in overrides if o.lstrip("+~").partition("=")[0] in keys]
    name = re.sub(r"[^\w.=+,@-]+", "_", ",".join(own)).strip("_.") or "job"
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{digest(own)}"


def digest(overrides: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class SweepJob:
    """``name``: of its folder in ``sweep``. ``overrides``: what distinguishes its run from the defaults."""

    sweep: Path
    name: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run's: its own one, unless the command line says ``output_dir``."""
        said = [o.partition("=")[2] for o in self.overrides if o.startswith("output_dir=")]
        return Path(os.path.expanduser(unquoted(said[-1]))) if said else self.sweep / self.name

    @property
    def words(self) -> list[str]:
        """As one run on a command line: of an experiment that is a sweep, this job alone."""
        one = ["hydra.mode=RUN"] if any(o.lstrip("+").startswith("experiment=") for o in self.overrides) else []
        return [*self.overrides, *one]

    @property
    def note(self) -> Path:
        """Where a job that fails says why, in a line."""
        return self.sweep / KEPT / f"{self.name}.error"

    @property
    def prune_file(self) -> Path:
        """Whoever makes this file asks the job to save and end, as a bad trial."""
        return self.sweep / KEPT / f"{self.name}.prune"

    def read(self) -> dict[str, Any]:
        """The job's state; empty when there is none."""
        return _read(self.sweep / self.name)

    def write(self, **changes: Any) -> None:
        file = self.sweep / self.name / "job.json"
        check_links(self.sweep, "sweep_dir", [self.name])
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = {"name": self.name, "overrides": list(self.overrides), "created": time.time(), "status": "waiting"}
        fresh |= {"exit_code": None, "error": None, "seconds": 0.0}
        write_json(file, fresh | self.read() | changes)

    def lock(self) -> Lock | None:
        """What holds this job until it is released everywhere; ``None``: somebody else has it.

        A child that inherits it goes on holding: a job whose parent was killed is still at work.
        """
        return lock_of(self.sweep, f"{self.name}.lock", wait=False)

    @contextmanager
    def alone(self) -> Iterator[Lock]:
        """Wait until nobody else is at work on this job, and hold it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        said = False
        while (held := self.lock()) is None:
            if not said and time.monotonic() > deadline:
                notice(f"{self.name}: another command is at work on it; waiting")
                said = True
            time.sleep(0.1)
        try:
            yield held
        finally:
            held.release()


def lock_of(sweep: Path, name: str, *, wait: bool = True) -> Lock | None:
    sweep.mkdir(parents=True, exist_ok=True)
    folder = own_folder(sweep / KEPT)
    try:
        return Lock(folder / name).acquire(timeout=None if wait else 0)
    except Busy:
        return None


@contextmanager
def alone_in(sweep: Path) -> Iterator[None]:
    """Hold the sweep's folder for a moment: to make a job's folder, or to rewrite the table."""
    held = lock_of(sweep, "table.lock")
    assert held is not None
    try:
        yield
    finally:
        held.release()


def jobs_in(sweep: Path) -> list[tuple[SweepJob, dict[str, Any]]]:
    """Every job of a sweep folder with its state, in the order they were thought of. A run that was moved aside
    (``resume=never``) is none."""
    found = []
    for file in sweep.glob("*/job.json"):
        state = _read(file.parent)
        if state.get("name") == file.parent.name:
            found.append((SweepJob(sweep, state["name"], tuple(state["overrides"])), state))
    return sorted(found, key=lambda job: (job[1]["created"], job[0].name))


def job_of(sweep: Path, overrides: list[str], keys: tuple[str, ...]) -> SweepJob:
    """The job with these overrides: the one that is already there, or a new one in a folder of its own."""
    words = plain(overrides)
    with alone_in(sweep):
        known = {tuple(sorted(job.overrides)): job for job, _ in jobs_in(sweep)}
        if found := known.get(tuple(sorted(words))):
            return found
        name = readable_name(words, keys)
        if os.path.lexists(
            sweep / name
        ):  # of a job that differs in what isn't swept, or in what a file name can't hold
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
    _say(f"{file}: not the state of a job; it is left out")
    return {}


def _is_state(content: Any) -> bool:
    if not isinstance(content, dict) or not all(type(content.get(key)) in kinds for key, kinds in TYPES.items()):
        return False
    numbers = [value for value in content.values() if isinstance(value, float)]
    return all(map(math.isfinite, numbers)) and all(isinstance(word, str) for word in content["overrides"])


@cache  # the folders are read again for every table
def _say(message: str) -> None:
    notice(message)
