"""A queue of messages to a subprocess, for work that may hang: the sender never blocks."""

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
PATIENCE_SECONDS = 3.0  # before a notice says what is being waited for


class SubprocessQueue:
    """A subprocess that runs ``module`` and receives JSON objects on stdin, one per line, until the end of stdin.

    The subprocess has its own session, so that signals of the terminal don't reach it. Its stdout is printed as notices; its
    stderr is appended to ``log``. When more than ``MOST_WAITING`` messages are queued, further ones are dropped, and the first
    drop is reported.
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
        self._listener = threading.Thread(target=self._listen, name="subprocess-queue", daemon=True)
        self._listener.start()
        threading.Thread(target=self._carry, name="subprocess-queue", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Queue ``message``, or drop it if the queue is full. This never blocks."""
        try:
            self._waiting.put_nowait(message)
        except Full:
            if not self._lost:
                notice(
                    f"{self._log.stem} does not accept records fast enough: some records are dropped; the run continues"
                )
            self._lost += 1

    def finish(self, *, seconds: float) -> None:
        """Wait until the process has read all messages and exited; kill it after ``seconds``."""
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
                notice(f"{self._log.stem} did not exit within {seconds:g} s and was killed")

    def _carry(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                while (message := self._waiting.get()) is not None:
                    pipe.write(json.dumps(message).encode() + b"\n")
                    pipe.flush()
        except BrokenPipeError:  # the process has exited by itself; `_listen` reports it
            while self._waiting.get() is not None:
                pass

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            notice(line.decode(errors="replace").rstrip("\n"))
        code = self._process.wait()
        if code and not self._killed:
            notice(f"{self._log.stem} exited with code {code}, see {self._log}; the run continues without it")
