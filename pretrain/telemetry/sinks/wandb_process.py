"""The subprocess that communicates with W&B. It reads messages of `wandb.py` from stdin, one JSON object per line:

``{"start": …}`` starts or resumes a run, ``{"record": …}`` is a record of the run, ``{"end": null}`` closes the run. If stdin
ends without ``end``, the training process was killed. Lines on stdout are shown to the user.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import chdir, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from omegaconf import OmegaConf

from pretrain.runtime.lines import json_lines
from pretrain.runtime.locks import Busy, Lock
from pretrain.runtime.redact import redact
from pretrain.telemetry.record import Record, scalars

ROWS = ("train", "layers", "data", "evaluation", "sample")  # events that become rows, in this order within a step
COLUMNS: list[Any] = ["domain", "role", "prompt", "text"]  # columns of the table of samples
SUMMARY = ("status", "tokens", "train_seconds", "tokens_per_second", "goodput", "mfu")
EXIT_CODES = {"finished": 0, "stopped": 75}


class Run:
    """One start of a run.

    W&B rejects a row whose number is below the last one's, and can't delete a row. A row's number is therefore computed from
    its step and its event: rows that a resumed run writes again have numbers that exist already and are skipped, and a pending
    evaluation has a number that is still free. Charts use ``step`` as their x-axis.
    """

    def __init__(self, order: dict[str, Any], out: TextIO) -> None:
        self._order = order
        self._out = out
        self._rows: dict[int, dict[str, Any]] = {}  # rows of the current step, sent when the next step starts
        self._step = -1
        self._skipped = 0
        self._exit_code = 75  # a rollback, unless a `run_finished` record follows
        self._lock = Lock(Path(order["folder"], ".wandb_lock"))
        with suppress(Busy):  # the subprocess of an earlier start that was killed may still be sending
            self._lock.acquire(timeout=order["timeout"])
        self._run = self._begin()
        self._first_row = self._run.step
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for record in order["records"] or ():
            self._keep(record)
        if order["records"] is not None and self._run.offline:
            self._archive_earlier()

    def record(self, record: Record) -> None:
        """Send one record to W&B, as a row, a summary, or an alert."""
        match record["event"]:
            case "run_started":
                facts = {key: value for key, value in record.items() if key not in ("event", "step", "time")}
                self._run.config.update({"facts": facts}, allow_val_change=True)
            case "rollback":
                self._alert("Rolled back to a checkpoint", f"{record['reason']} in step {record['bad_step']}", record)
            case "run_finished":
                self._finish(record)
            case _:
                skipped = record.get("skipped_steps") or 0
                if skipped > self._skipped and record.get("loss_scale") is None:  # a loss scaler skips by design
                    self._alert("Steps skipped", f"{skipped} so far; quarantine.jsonl has their text", record)
                self._keep(record)

    def end(self, exit_code: int | None = None) -> None:
        """Send the remaining rows and close the W&B run."""
        try:
            self._flush()
            self._run.finish(exit_code=self._exit_code if exit_code is None else exit_code)
        except TimeoutError:
            send = f"wandb sync --include-online {self._run.sync_dir}"
            print(f"W&B did not receive everything in time; to send it: {send}", file=self._out)
        finally:
            self._lock.release()

    def _begin(self) -> Any:
        """Start the W&B run online; if that fails, start it offline, so that no record is lost."""
        import wandb

        if self._order["mode"] == "online":
            try:
                run = self._init("online", resume="allow")
                print(f"W&B: {run.url}", file=self._out)
                return run
            except Exception as error:
                reason = " ".join(redact(str(error)).split())
                print(f"W&B can't be reached, so this run is recorded offline: {reason}", file=self._out)
                wandb.teardown()
        run = self._init("offline")
        print(f"W&B: to send this run: wandb sync {run.sync_dir}", file=self._out)
        return run

    def _init(self, mode: Any, **more: Any) -> Any:
        import wandb

        read_settings()
        order, folder = self._order, Path(self._order["folder"])
        config: Any = OmegaConf.to_container(OmegaConf.create(redact((folder / "config.yaml").read_text())))
        given = {key: order[key] for key in ("id", "project", "entity", "name", "group", "tags", "notes")}
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=order["timeout"],
            finish_timeout=order["timeout"],
            finish_timeout_raises=True,
        )
        return wandb.init(dir=folder, config=config, mode=mode, settings=settings, **given, **more)

    def _archive_earlier(self) -> None:
        """Move the offline folders of earlier starts away: this start writes their records again, so that they would be sent
        twice."""
        here = Path(self._run.sync_dir)
        for earlier in here.parent.glob(f"offline-run-*-{self._run.id}"):
            if earlier != here:
                (here.parent / "earlier").mkdir(exist_ok=True)
                earlier.rename(here.parent / "earlier" / earlier.name)

    def _keep(self, record: Record) -> None:
        self._skipped = max(self._skipped, record.get("skipped_steps") or 0)
        event = "evaluation" if record["event"] == "metric" else record["event"]  # one row of an evaluation's numbers
        if event not in ROWS:
            return
        if record["step"] != self._step:
            self._flush()
            self._step = record["step"]
        number = len(ROWS) * record["step"] + ROWS.index(event)
        row = self._rows.setdefault(number, {"step": record["step"], "_timestamp": record["time"]})
        if record["event"] == "sample":
            row.setdefault("samples", []).append([record.get(column) for column in COLUMNS])
        else:
            row.update(scalars(record))

    def _flush(self) -> None:
        import wandb

        for number, row in sorted(self._rows.items()):
            if number >= self._first_row:
                if "samples" in row:
                    row["samples"] = wandb.Table(columns=COLUMNS, data=row["samples"])
                self._run.log(row, step=number)
        self._rows = {}

    def _finish(self, record: Record) -> None:
        import wandb

        self._exit_code = EXIT_CODES.get(record["status"], 1)
        self._flush()
        self._run.summary.update({key: record[key] for key in SUMMARY if record.get(key) is not None})
        if record["status"] != "finished":
            self._alert(f"Run {record['status']}", "the same command resumes from the last checkpoint", record)
        elif self._order["log_model"] and record["model"]:
            artifact = wandb.Artifact(f"model-{self._run.id}", type="model", metadata={"step": record["step"]})
            artifact.add_dir(record["model"], policy="immutable")  # "immutable" avoids a second copy on this disk
            self._run.log_artifact(artifact)

    def _alert(self, title: str, text: str, record: Record) -> None:
        if self._order["alerts"]:
            self._run.alert(title, f"step {record['step']}: {text}", level="WARN")


def read_settings() -> None:
    """Make W&B read its settings while an empty folder is the current one. ``wandb/settings`` of the real current folder may
    belong to another user and name the server to which the key is sent."""
    import wandb

    with TemporaryDirectory() as nothing, chdir(nothing):
        wandb.setup()


class MessageHandler:
    """Handles the messages. If W&B fails on a message, the first failure is reported and later messages are still handled."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._run: Run | None = None
        self._failure_reported = False

    def handle(self, message: dict[str, Any]) -> None:
        """Handle one message; an exception is reported and never raised."""
        try:
            if "start" in message:
                self._run = Run(message["start"], self._out)
            elif self._run is not None and "record" in message:
                self._run.record(message["record"])
            elif self._run is not None:
                run, self._run = self._run, None
                run.end()
        except Exception as error:
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
            if not self._failure_reported:
                print(f"W&B: {type(error).__name__}: {' '.join(redact(str(error)).split())[:300]}", file=self._out)
            self._failure_reported = True

    def close_failed(self) -> None:
        """Close the run as failed: stdin ended without an ``end`` message."""
        if self._run is not None:
            self._run.end(exit_code=1)


def main() -> None:
    """Handle the messages on stdin. Signals are ignored, because the training handles them and its last records are still to
    be sent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    handler = MessageHandler(os.fdopen(os.dup(1), "w", buffering=1))
    os.dup2(2, 1)
    for _, message in json_lines(sys.stdin.buffer):
        handler.handle(message)
    handler.close_failed()


if __name__ == "__main__":
    main()
