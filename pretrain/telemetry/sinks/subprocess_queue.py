"""Messages to a process of its own, for what may hang: whoever sends never waits."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from queue import Full, Queue
from typing import Any

from pretrain.runtime.console import notice
from pretrain.runtime.python import module_command
from pretrain.runtime.safe_files import open_append, own_folder

MOST_WAITING = 10_000  # messages
PATIENCE_SECONDS = 3.0  # before a person is told what is waited for


class SubprocessQueue:
    """Runs ``module`` in a session of its own, so that a terminal's signals don't reach it. It gets JSON objects, one a line,
    and their end; what it prints is said to people. What it, or a library in it, writes to stderr goes to ``log``.

    When more than ``MOST_WAITING`` messages wait, further ones are lost; it is said once.
    """

    def __init__(self, module: str, *, log: Path) -> None:
        self._log = log
        own_folder(log.parent)
        with open_append(log, mode="ab") as errors:
            self._process = subprocess.Popen(
                module_command(module),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._waiting: Queue[dict[str, Any] | None] = Queue(MOST_WAITING)
        self._lost = 0
        self._killed = False
        self._listener = threading.Thread(target=self._listen, name="courier", daemon=True)
        self._listener.start()
        threading.Thread(target=self._carry, name="courier", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._waiting.put_nowait(message)
        except Full:
            if not self._lost:
                notice(f"{self._log.stem} does not take its records: from here on some are lost to it; the run goes on")
            self._lost += 1

    def finish(self, *, seconds: float) -> None:
        """Wait until the process has taken everything and has ended, at most ``seconds``; then it is killed."""
        threading.Thread(target=self._waiting.put, args=(None,), daemon=True).start()
        try:
            self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            notice(f"waiting for {self._log.stem}, at most {seconds:g} s")
            try:
                self._process.wait(seconds - PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self._killed = True
                self._process.kill()
                notice(f"{self._log.stem} did not end in {seconds:g} s and was killed")

    def _carry(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                while (message := self._waiting.get()) is not None:
                    pipe.write(json.dumps(message).encode() + b"\n")
                    pipe.flush()
        except BrokenPipeError:  # it has ended by itself; `_listen` says so
            while self._waiting.get() is not None:
                pass

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            notice(line.decode(errors="replace").rstrip("\n"))
        code = self._process.wait()
        if code and not self._killed:
            notice(f"{self._log.stem} has ended with {code}, see {self._log}; the run goes on without it")
