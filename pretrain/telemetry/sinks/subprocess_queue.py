"""A queue of messages to a subprocess, for work that may hang: the sender never blocks."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from queue import Full, Queue
from typing import Any

from pretrain.runtime.console import notice
from pretrain.runtime.files import open_append, own_folder
from pretrain.runtime.python import module_command

MAX_QUEUED = 10_000  # messages
NOTICE_AFTER_SECONDS = 3.0  # before a notice says what is being waited for


class SubprocessQueue:
    """A subprocess that runs ``module`` and receives JSON objects on stdin, one per line, until the end of stdin.

    The subprocess has its own session, so that signals of the terminal don't reach it. Its stdout is printed as notices; its
    stderr is appended to ``log``. When more than ``MAX_QUEUED`` messages are queued, further ones are dropped, and the first
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
        self._messages: Queue[dict[str, Any] | None] = Queue(MAX_QUEUED)
        self._dropped = 0
        self._killed = False
        self._reader = threading.Thread(target=self._print_output, name="subprocess-queue", daemon=True)
        self._reader.start()
        threading.Thread(target=self._write_messages, name="subprocess-queue", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """Queue ``message``, or drop it if the queue is full. This never blocks."""
        try:
            self._messages.put_nowait(message)
        except Full:
            if not self._dropped:
                notice(
                    f"{self._log.stem} does not accept records fast enough: some records are dropped; the run continues"
                )
            self._dropped += 1

    def finish(self, *, seconds: float) -> None:
        """Wait until the process has read all messages and exited; kill it after ``seconds``."""
        threading.Thread(target=self._messages.put, args=(None,), daemon=True).start()
        try:
            self._process.wait(NOTICE_AFTER_SECONDS)
        except subprocess.TimeoutExpired:
            notice(f"waiting for {self._log.stem}, at most {seconds:g} s")
            try:
                self._process.wait(seconds - NOTICE_AFTER_SECONDS)
            except subprocess.TimeoutExpired:
                self._killed = True
                self._process.kill()
                notice(f"{self._log.stem} did not exit within {seconds:g} s and was killed")

    def _write_messages(self) -> None:
        assert self._process.stdin is not None
        try:
            with self._process.stdin as pipe:
                while (message := self._messages.get()) is not None:
                    pipe.write(json.dumps(message).encode() + b"\n")
                    pipe.flush()
        except BrokenPipeError:  # the process has exited by itself; `_print_output` reports it
            while self._messages.get() is not None:
                pass

    def _print_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            notice(line.decode(errors="replace").rstrip("\n"))
        code = self._process.wait()
        if code and not self._killed:
            notice(f"{self._log.stem} exited with code {code}, see {self._log}; the run continues without it")
