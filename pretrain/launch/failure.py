"""Reports of failing workers to their parent: small files, which also arrive from a process that is about to crash."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.runtime.errors import ReplicasDiffer, UserError
from pretrain.runtime.files import replace_file

# Files in which a rank waits for the others: those with collectives, and autograd's backward, which runs some.
WAITING = ("distributed/context.py", "distributed_c10d.py", "_fsdp", "graph.py")


@dataclass(frozen=True)
class WorkerFailure:
    """The failure of one worker.

    Attributes:
        rank: Global rank of the worker.
        message: One line for a user's mistake; the exception's message for a bug.
        trace: The complete traceback of a bug, else empty.
        time: Time of the failure in seconds, by this machine's monotonic clock.
        is_mistake: The cause is a ``UserError``.
        stands_at: The place in the code at which a hanging process is stalled.
    """

    rank: int
    message: str
    trace: str
    time: float
    is_mistake: bool = False
    stands_at: str | None = None

    @property
    def first_line(self) -> str:
        return self.message.splitlines()[0] if self.message else "failed"

    def terminal_message(self, logs: Path) -> str:
        """Return the message for the terminal, with the log file that has the details."""
        more = f"{logs}/rank-{self.rank}.log"
        return (
            f"rank {self.rank} {self.message}; see {more}"
            if not self.trace
            else f"{self.trace}rank {self.rank} failed; see {more}"
        )


def write_report(folder: Path, rank: int, error: BaseException) -> None:
    """Write the report of a worker that failed with ``error``."""
    mistake = isinstance(error, UserError)
    explained = mistake or isinstance(error, ReplicasDiffer)  # the message is enough, and is the same on every rank
    message = str(error) if mistake else f"failed: {type(error).__name__}: {error}"
    if isinstance(error, ReplicasDiffer):
        message = f"found that replicas differ: {error}"
    trace = "" if explained else "".join(traceback.format_exception(error))
    _write(folder, WorkerFailure(rank, message, trace, time.monotonic(), mistake))


def write_hang(folder: Path, rank: int, place: str, how_long: str) -> None:
    """Write the report of a worker that is stalled at ``place``."""
    _write(folder, WorkerFailure(rank, how_long, "", time.monotonic(), stands_at=place))


def cause_of_hang(hangs: dict[int, WorkerFailure], silent: list[int]) -> WorkerFailure:
    """Return one report of a hang of the group.

    A rank in ``silent`` is the cause. Otherwise it is a rank that is stalled outside the code in which ranks wait for each
    other, at the place with the fewest ranks.

    Args:
        hangs: The reports by rank, the earliest first.
        silent: Ranks that are alive and wrote no report.
    """
    first, places = next(iter(hangs.values())), dict[str, list[int]]()
    for rank, report in sorted(hangs.items()):
        places.setdefault(report.stands_at or "", []).append(rank)
    rare = min(places, key=lambda place: (any(name in place for name in WAITING), len(places[place])))
    where = [f"rank {', '.join(map(str, ranks))} at {place}" for place, ranks in places.items()]
    rank, how = (silent[0], "does not answer") if silent else (places[rare][0], "is stalled")
    return WorkerFailure(
        rank,
        f"{how}: {hangs.get(rank, first).message}; {'; '.join(where)}; the stacks of every rank are in its log",
        "",
        time.monotonic(),
    )


def _write(folder: Path, report: WorkerFailure) -> None:
    replace_file(folder / f"rank-{report.rank}.json", json.dumps(asdict(report)))


def read_reports(folder: Path) -> Iterator[WorkerFailure]:
    """Yield the reports that workers have written so far."""
    for file in folder.glob("rank-*.json"):
        yield WorkerFailure(**json.loads(file.read_text()))
