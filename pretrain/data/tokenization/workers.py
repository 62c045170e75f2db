"""Encoders in child processes. A worker is a plain ``python -m pretrain.data.tokenization.workers`` that reads one JSON object
per line and answers in the same form. It does not import the caller's main module. When the caller dies, by any signal, the
worker's input ends and the worker exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.data.reading.units import FileRange, ReadOptions, WorkUnit
from pretrain.data.tokenization.encode import Encoder, Outcome, Progress
from pretrain.data.tokenization.shared_work import SharedWork
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import partial_of
from pretrain.runtime.python import PACKAGE, module_command
from pretrain.runtime.signals import SIGNAL_POLL_SECONDS, signals_blocked


def encode_in_workers(shared: SharedWork, encoder: Encoder, num_workers: int, progress: Progress) -> None:
    """Encode the units of ``shared`` with ``num_workers`` processes. Each worker takes the next unit when it has finished one.

    The first error stops the work: the other workers finish their current unit, which is kept, and take no further one.
    """
    workers: list[_Worker] = []

    def work(worker: _Worker) -> None:
        try:
            while (claim := shared.take()) is not None:
                try:
                    shared.finish(claim, worker.encode(claim.unit, progress))
                finally:
                    claim.lock.release()
        except BaseException:
            shared.stop()
            raise

    with ThreadPoolExecutor(num_workers) as pool:
        futures: list[Future[None]] = []
        try:
            with signals_blocked():  # only the caller reacts to signals that are sent to the process group
                workers.extend(_Worker(encoder) for _ in range(num_workers))
            futures.extend(pool.submit(work, worker) for worker in workers)
            while wait(futures, SIGNAL_POLL_SECONDS).not_done:
                pass
            for future in futures:
                future.result()
        except UserError:
            raise
        except BaseException:  # e.g. Ctrl-C: do not wait for unfinished units
            shared.stop()
            for worker in workers:
                worker.process.kill()
            raise
        finally:
            for future in futures:
                future.exception()
            for worker in workers:
                worker.close()


class _Worker:
    """One child process, as seen by the caller."""

    def __init__(self, encoder: Encoder) -> None:
        root = str(PACKAGE.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            module_command("pretrain.data.tokenization.workers"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.folder = encoder.folder
        self._send(encoder.arguments())

    def encode(self, unit: WorkUnit, progress: Progress) -> Outcome:
        """Let the worker encode ``unit``. Raises the worker's ``UserError``, or ``RuntimeError`` if it failed or died."""
        self._send([asdict(piece) for piece in unit.pieces])
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            if "bytes" in answer:
                progress(answer["bytes"])
            elif "mistake" in answer:
                raise UserError(answer["mistake"])
            elif "traceback" in answer:
                raise RuntimeError(f"a tokenizing worker failed:\n{answer['traceback']}")
            else:
                return Path(answer["path"]), answer["digests"]
        raise RuntimeError(f"a tokenizing worker died with exit code {self.process.wait()}; out of memory?")

    def close(self) -> None:
        """Wait until the process has ended and delete its temporary files."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # the worker died; `encode` has reported that
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        for left in self.folder.glob(f"*/{partial_of(Path('*'), process=self.process.pid)}"):
            left.unlink(missing_ok=True)

    def _send(self, request: Any) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the worker died; `encode` reports it when it reads the answer
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()


def serve() -> None:
    """Run the worker. It reads the encoder's arguments, then one unit per line. For each unit it answers {"bytes"} while it
    works and {"path", "digests"} at the end, or {"mistake"} or {"traceback"}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not be mixed with the answers

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    if not (line := sys.stdin.readline()):  # the caller was stopped
        return
    setup = json.loads(line)
    setup |= {name: Path(setup[name]) for name in ("folder", "tokenizer_path")}
    encoder = Encoder(**{**setup, "options": ReadOptions(**setup["options"])})
    for line in sys.stdin:
        unit = WorkUnit(tuple(FileRange(**{**piece, "stamp": tuple(piece["stamp"])}) for piece in json.loads(line)))
        try:
            path, digests = encoder.encode(unit, lambda amount: send({"bytes": amount}))
            send({"path": str(path), "digests": digests})
        except UserError as error:
            send({"mistake": str(error)})
        except BrokenPipeError:
            raise
        except Exception:
            send({"traceback": traceback.format_exc()})


if __name__ == "__main__":
    try:
        serve()
    except BrokenPipeError:  # the caller is gone
        os._exit(1)
