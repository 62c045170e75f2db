"""A subclass of torch's local elastic agent with another shutdown.

It forwards signals to the workers, does not retry a user's mistake, and finds the cause of a failure.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousError

from pretrain.launch.failure import WorkerFailure, cause_of_hang, read_reports
from pretrain.launch.torch_agent import TorchAgent
from pretrain.run.folder import claimed_by
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, WorkersFailed
from pretrain.runtime.signals import ONE_CTRL_C_SECONDS, SIGNALS, Stopped
from pretrain.telemetry.run_file import mark_failed

# Only the kernel or a person sends these. SIGABRT can be a consequence of another rank's failure, and torch sends SIGTERM.
FATAL_SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
REPORT_SECONDS = 1.0  # after one worker has exited, the others have this long to write their reports
STACKS_SECONDS = 0.5  # after that, workers that are still alive have this long to write their stacks


class Agent(TorchAgent):
    """The parent of the local workers.

    Attributes:
        reports: The folder in which a failing worker writes its report.
        stop: Name of the signal that stopped the run; ``None`` without one.
        deaths: Exit codes of the workers that ended by themselves with a failure, by global rank.
        stuck: Global ranks of the workers that had to be killed.
    """

    def __init__(self, *args: Any, reports: Path, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reports = reports
        self.stop: str | None = None
        self._stop_time = 0.0
        self._pids: list[int] = []
        self.deaths: dict[int, int] = {}
        self.stuck: set[int] = set()
        self._closed = False

    def outcome(self, run: Path) -> list[int]:
        """Run the workers to the end and return their exit codes by rank.

        Raises ``UserError``, ``Stopped`` or ``WorkersFailed`` by the cause of a failure.
        """
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            result = self.run()
            if not result.is_failed():
                return list(result.return_values.values())
        except RendezvousError as error:
            raise WorkersFailed(f"the nodes did not meet within launch.timeout: {type(error).__name__}") from error
        finally:
            if claimed_by(run) == self.rendezvous.get_run_id():  # otherwise another command uses the folder
                mark_failed(run)
            self.rendezvous.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        cause = self.cause()
        if cause.is_mistake:
            raise UserError(cause.message)
        if self.stop is not None:
            raise Stopped(self.stop)
        raise WorkersFailed(cause.terminal_message(run / "logs"))

    def cause(self) -> WorkerFailure:
        """Return the cause: a user's mistake, else a hang, else a death by a signal, else the earliest exception."""
        reports = sorted(read_reports(self.reports), key=lambda report: (not report.is_mistake, report.time))
        if reports and reports[0].is_mistake:
            return reports[0]
        hangs = {report.rank: report for report in reports if report.stands_at}
        if hangs:
            return cause_of_hang(hangs, sorted(self.stuck - hangs.keys()))
        for rank, code in self.deaths.items():
            if -code in FATAL_SIGNALS:
                return WorkerFailure(rank, f"was killed by {signal.Signals(-code).name}", "", time.monotonic())
        if reports:
            return reports[0]
        rank, code = next(iter(self.deaths.items()), (0, 1))
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return WorkerFailure(rank, how, "", 0.0)

    # -- what the agent calls --------------------------------------------------------------------------------------------

    def before_start(self) -> None:
        for old in self.reports.glob("rank-*.json"):
            old.unlink()
        if self.stop is not None:  # the signal arrived while an earlier attempt was ending
            raise Stopped(self.stop)
        self._pids, self._closed = [], False
        for number in SIGNALS:
            signal.signal(number, self._forward_signal)

    def after_start(self, pids: list[int]) -> None:
        self._pids = pids
        if self.stop is not None:  # the signal arrived while the workers were starting
            self._kill(signal.SIGTERM)

    def after_failure(self) -> None:
        cause = self.cause()
        if cause.is_mistake or self.stop is not None:
            self.remaining_restarts = 0
        if self.remaining_restarts > 0:
            restarts = self.get_worker_group().spec.max_restarts
            notice(
                f"rank {cause.rank} {cause.first_line}; all ranks restart from the last checkpoint "
                f"(restart {restarts - self.remaining_restarts + 1} of {restarts})"
            )

    def end_workers(self, close: Callable[..., None]) -> None:
        """Record which workers have exited by themselves, let the others write their stacks, and kill them.

        Without all ranks the others could not save a checkpoint. Only the first call records, before anything is killed.
        """
        if self._closed:
            return
        self._closed = True
        by_rank = self.processes
        until = time.monotonic() + REPORT_SECONDS
        while any(p.is_alive() for p in by_rank.values()) and time.monotonic() < until:
            time.sleep(0.02)
        self.deaths = {rank: p.exitcode for rank, p in by_rank.items() if p.exitcode not in (None, 0)}
        self.stuck = {rank for rank, p in by_rank.items() if p.is_alive()}
        for rank in self.stuck:
            for number in (signal.SIGUSR2, signal.SIGCONT):  # SIGCONT: a suspended worker can write its stacks, too
                with suppress(ProcessLookupError):
                    os.kill(by_rank[rank].pid, number)
        if self.stuck:
            time.sleep(STACKS_SECONDS)
        close(signal.SIGKILL, 5)

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward a stop signal: the workers finish the step and save a checkpoint. A second Ctrl-C kills them."""
        name = signal.Signals(number).name
        if self.stop is None:
            self.stop, self._stop_time = name, time.monotonic()
            self._kill(signal.SIGTERM)
            notice(f"{name}: finishing this step, then saving; Ctrl-C again exits immediately")
        elif number == signal.SIGINT and time.monotonic() - self._stop_time > ONE_CTRL_C_SECONDS:
            self._kill(signal.SIGKILL)
            raise SystemExit(128 + number)

    def _kill(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
