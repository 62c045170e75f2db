"""The process that talks to W&B. It reads orders from stdin (`wandb.py` sends them), one JSON object a line:

``{"start": …}`` begins or continues a run, ``{"record": …}`` is one of its records, ``{"end": null}`` closes it. The end of
stdin without one: the training was killed. What is printed is said to people.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from contextlib import chdir, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from omegaconf import OmegaConf

from pretrain.runtime.locks import Busy, Lock
from pretrain.runtime.redact import redact
from pretrain.telemetry.record import Record, scalars

ROWS = ("train", "layers", "data", "evaluation", "sample")  # what becomes a row, in this order within a step
COLUMNS: list[Any] = ["domain", "role", "prompt", "text"]  # of the table of samples
SUMMARY = ("status", "tokens", "train_seconds", "tokens_per_second", "goodput", "mfu")
EXIT_CODES = {"finished": 0, "stopped": 75}


class Run:
    """One start of a run.

    W&B has no rows with a number below the last one's, and can't take a row back. So a row's number is made of its step and
    its kind: what a resumed run tells once more has the number of what is there already and is passed over, and an
    evaluation that was still owed has one that is free. Charts have ``step`` as their x-axis.
    """

    def __init__(self, order: dict[str, Any], say: TextIO) -> None:
        self._order = order
        self._say = say
        self._held: dict[int, dict[str, Any]] = {}  # rows of the newest step, until another one comes
        self._step = -1
        self._skipped = 0
        self._exit_code = 75  # it goes back to a checkpoint, unless its end is told
        self._lock = Lock(Path(order["folder"], ".wandb_lock"))
        with suppress(Busy):  # the process of an earlier start, whose training was killed, may still be sending
            self._lock.acquire(timeout=order["timeout"])
        self._run = self._begin()
        self._first_row = self._run.step
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for record in order["records"] or ():
            self._keep(record)
        if order["records"] is not None and self._run.offline:
            self._put_aside_earlier()

    def record(self, record: Record) -> None:
        match record["event"]:
            case "run_started":
                facts = {key: value for key, value in record.items() if key not in ("event", "step", "time")}
                self._run.config.update({"facts": facts}, allow_val_change=True)
            case "rollback":
                self._alert("Back to a checkpoint", f"{record['reason']} in step {record['bad_step']}", record)
            case "run_finished":
                self._finish(record)
            case _:
                skipped = record.get("skipped_steps") or 0
                if skipped > self._skipped and record.get("loss_scale") is None:  # a loss scaler skips by design
                    self._alert("Steps not trained", f"{skipped} so far; quarantine.jsonl has their text", record)
                self._keep(record)

    def end(self, exit_code: int | None = None) -> None:
        try:
            self._flush()
            self._run.finish(exit_code=self._exit_code if exit_code is None else exit_code)
        except TimeoutError:
            send = f"wandb sync --include-online {self._run.sync_dir}"
            print(f"W&B has not taken everything in time; to send it: {send}", file=self._say)
        finally:
            self._lock.release()

    def _begin(self) -> Any:
        """Online where that works; else offline, so that nothing is lost."""
        import wandb

        if self._order["mode"] == "online":
            try:
                run = self._init("online", resume="allow")
                print(f"W&B: {run.url}", file=self._say)
                return run
            except Exception as error:
                reason = " ".join(redact(str(error)).split())
                print(f"W&B can't be reached, so this run is recorded offline: {reason}", file=self._say)
                wandb.teardown()
        run = self._init("offline")
        print(f"W&B: to send this run: wandb sync {run.sync_dir}", file=self._say)
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

    def _put_aside_earlier(self) -> None:
        """What earlier starts wrote offline is the beginning of what this one writes, and would only be sent twice."""
        here = Path(self._run.sync_dir)
        for earlier in here.parent.glob(f"offline-run-*-{self._run.id}"):
            if earlier != here:
                (here.parent / "earlier").mkdir(exist_ok=True)
                earlier.rename(here.parent / "earlier" / earlier.name)

    def _keep(self, record: Record) -> None:
        self._skipped = max(self._skipped, record.get("skipped_steps") or 0)
        if record["event"] not in ROWS:
            return
        if record["step"] != self._step:
            self._flush()
            self._step = record["step"]
        number = len(ROWS) * record["step"] + ROWS.index(record["event"])
        row = self._held.setdefault(number, {"step": record["step"], "_timestamp": record["time"]})
        if record["event"] == "sample":
            row.setdefault("samples", []).append([record.get(column) for column in COLUMNS])
        else:
            row.update(scalars(record))

    def _flush(self) -> None:
        import wandb

        for number, row in sorted(self._held.items()):
            if number >= self._first_row:
                if "samples" in row:
                    row["samples"] = wandb.Table(columns=COLUMNS, data=row["samples"])
                self._run.log(row, step=number)
        self._held = {}

    def _finish(self, record: Record) -> None:
        import wandb

        self._exit_code = EXIT_CODES.get(record["status"], 1)
        self._flush()
        self._run.summary.update({key: record[key] for key in SUMMARY if record.get(key) is not None})
        if record["status"] != "finished":
            self._alert(f"Run {record['status']}", "the same command goes on from the last checkpoint", record)
        elif self._order["log_model"] and record["model"]:
            artifact = wandb.Artifact(f"model-{self._run.id}", type="model", metadata={"step": record["step"]})
            artifact.add_dir(record["model"], policy="immutable")  # no second copy of it on this disk
            self._run.log_artifact(artifact)

    def _alert(self, title: str, text: str, record: Record) -> None:
        if self._order["alerts"]:
            self._run.alert(title, f"step {record['step']}: {text}", level="WARN")


def read_settings() -> None:
    """Have W&B read the user's settings, in an empty folder: ``wandb/settings`` of the current one may be a stranger's, and
    name the server to which the key is sent."""
    import wandb

    with TemporaryDirectory() as nothing, chdir(nothing):
        wandb.setup()


class Orders:
    """Carries the orders out. What W&B can't do is said once and costs what it was about, not what comes after it."""

    def __init__(self, say: TextIO) -> None:
        self._say = say
        self._run: Run | None = None
        self._said = False

    def handle(self, message: dict[str, Any]) -> None:
        try:
            if "start" in message:
                self._run = Run(message["start"], self._say)
            elif self._run is not None and "record" in message:
                self._run.record(message["record"])
            elif self._run is not None:
                run, self._run = self._run, None
                run.end()
        except Exception as error:
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
            if not self._said:
                print(f"W&B: {type(error).__name__}: {' '.join(redact(str(error)).split())[:300]}", file=self._say)
            self._said = True

    def give_up(self) -> None:
        """The training is gone without a word."""
        if self._run is not None:
            self._run.end(exit_code=1)


def main() -> None:
    """Carry out the orders on stdin. Signals are the training's business: its last words are still to be sent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    orders = Orders(os.fdopen(os.dup(1), "w", buffering=1))
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):  # else it was torn by a kill
            orders.handle(json.loads(line))
    orders.give_up()


if __name__ == "__main__":
    main()
