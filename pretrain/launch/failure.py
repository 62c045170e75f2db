"""What a failing worker tells its parent: a small file, so that it arrives whatever state the process is in."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.runtime.atomic_files import replace_file
from pretrain.runtime.errors import ReplicasDiffer, UserError

# Where a rank waits for the others: in collectives, and in autograd's backward, which has some.
WAITING = ("context.py", "distributed_c10d.py", "_fsdp", "graph.py")


@dataclass(frozen=True)
class WorkerFailure:
    """``message``: one line for a mistake, the exception's for a bug, whose ``trace`` is the whole traceback.
    ``stands_at``: where a process that hangs does. ``time``: of this machine's monotonic clock."""

    rank: int
    message: str
    trace: str
    time: float
    is_mistake: bool = False
    stands_at: str | None = None

    @property
    def first_line(self) -> str:
        return self.message.splitlines()[0] if self.message else "failed"

    def told(self, logs: Path) -> str:
        """For the person at the terminal: once, and where to read more."""
        more = f"{logs}/rank-{self.rank}.log"
        return (
            f"rank {self.rank} {self.message}; see {more}"
            if not self.trace
            else f"{self.trace}rank {self.rank} failed; see {more}"
        )


def write_report(folder: Path, rank: int, error: BaseException) -> None:
    mistake = isinstance(error, UserError)
    explained = mistake or isinstance(error, ReplicasDiffer)  # by its message alone, on every rank alike
    message = str(error) if mistake else f"failed: {type(error).__name__}: {error}"
    if isinstance(error, ReplicasDiffer):
        message = f"found that replicas differ: {error}"
    trace = "" if explained else "".join(traceback.format_exception(error))
    _write(folder, WorkerFailure(rank, message, trace, time.monotonic(), mistake))


def write_hang(folder: Path, rank: int, place: str, how_long: str) -> None:
    _write(folder, WorkerFailure(rank, how_long, "", time.monotonic(), stands_at=place))


def cause_of_hang(hangs: dict[int, WorkerFailure], silent: list[int]) -> WorkerFailure:
    """One report out of all: ``hangs`` (by rank, the earliest first) and the ranks that gave no sign at all. Those are the
    cause, else whoever stands where nobody, or the fewest, stand, and not where a rank waits for the others."""
    first, places = next(iter(hangs.values())), dict[str, list[int]]()
    for rank, report in sorted(hangs.items()):
        places.setdefault(report.stands_at or "", []).append(rank)
    rare = min(places, key=lambda place: (any(name in place for name in WAITING), len(places[place])))
    where = [f"rank {', '.join(map(str, ranks))} at {place}" for place, ranks in places.items()]
    rank, how = (silent[0], "does not answer") if silent else (places[rare][0], "stands still")
    return WorkerFailure(
        rank,
        f"{how}: {hangs.get(rank, first).message}; {'; '.join(where)}; the stacks of every rank are in its log",
        "",
        time.monotonic(),
    )


def _write(folder: Path, report: WorkerFailure) -> None:
    replace_file(folder / f"rank-{report.rank}.json", json.dumps(asdict(report)))


def read_reports(folder: Path) -> Iterator[WorkerFailure]:
    for file in folder.glob("rank-*.json"):
        yield WorkerFailure(**json.loads(file.read_text()))
