"""torch's local elastic agent with methods in the places where another shutdown needs them.

Private to torch (seen in 2.10.0 and 2.13.0): of the agent ``_start_workers``, ``_monitor_workers``, ``_pcontext``,
``_rdzv_handler`` and ``_remaining_restarts``; of its process context ``_pc.processes``, and that the agent ends workers with
``_pcontext.close``. ``tests/test_internals.py`` and the tests of launches fail when they change.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousHandler


class TorchAgent(LocalElasticAgent):
    """A local elastic agent that calls `before_start`, `after_start`, `after_failure` and `end_workers`."""

    @abstractmethod
    def before_start(self) -> None:
        """Called before the workers of an attempt are started."""

    @abstractmethod
    def after_start(self, pids: list[int]) -> None:
        """Called when the workers of an attempt have been started."""

    @abstractmethod
    def after_failure(self) -> None:
        """Called when an attempt has failed and its workers have ended, before the agent decides whether to restart them."""

    @abstractmethod
    def end_workers(self, close: Callable[..., None]) -> None:
        """End the workers of an attempt, of which some may have exited: ``close(signal, seconds)`` sends them the signal, and
        SIGKILL after some seconds. The agent may call this several times."""

    @property
    def rendezvous(self) -> RendezvousHandler:
        """The rendezvous of the agents."""
        return self._rdzv_handler

    @property
    def remaining_restarts(self) -> int:
        """How many times the workers may still be restarted."""
        return self._remaining_restarts

    @remaining_restarts.setter
    def remaining_restarts(self, number: int) -> None:
        self._remaining_restarts = number

    @property
    def processes(self) -> dict[int, Any]:
        """The workers' processes, which have ``pid``, ``exitcode`` and ``is_alive``, by global rank."""
        assert self._pcontext is not None
        processes = self._pcontext._pc.processes  # type: ignore[attr-defined]
        return dict(zip((w.global_rank for w in self.get_worker_group().workers), processes, strict=True))

    # -- overrides -------------------------------------------------------------------------------------------------------

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.before_start()
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's handlers would raise anywhere
        started = super()._start_workers(worker_group)
        assert self._pcontext is not None
        close = self._pcontext.close
        closing = lambda *signal_and_timeout: self.end_workers(close)  # noqa: E731
        self._pcontext.close = closing  # type: ignore[method-assign]
        self.after_start(list(started.values()))
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self._pcontext is not None
        if any(process.exitcode for process in self.processes.values()):
            self._pcontext.close()  # torch would first send SIGTERM to the others and wait up to 30 s
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            self.after_failure()
        return result
