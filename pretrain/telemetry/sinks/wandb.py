"""Weights & Biases. Everything of W&B's happens in a process of its own (`wandb_process.py`): whatever becomes of the network
or of W&B, the training neither waits for it nor shares a lock, a signal or a random number with it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.runtime.atomic_files import replace_file
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import Record
from pretrain.telemetry.sinks import wandb_key
from pretrain.telemetry.sinks.base import Sink, require
from pretrain.telemetry.sinks.jsonl import records_until
from pretrain.telemetry.sinks.subprocess_queue import SubprocessQueue

RUN_ID = ".wandb_run_id"  # in the run folder: the same run in W&B for every start that goes on
GRACE_SECONDS = 15.0  # to start, and to end, the processes of W&B
Mode = Literal["online", "offline", "disabled"]


class Wandb(Sink):
    """The keys are explained in conf/sink/wandb.yaml. ``mode``: ``None`` is online where there is a key, else offline."""

    def __init__(
        self,
        mode: Mode | None = None,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        log_model: bool = False,
        alerts: bool = True,
        timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0,
    ) -> None:
        self._mode = mode
        self._group = group
        self._timeout = timeout
        self._given: dict[str, Any] = {
            "project": project or os.environ.get("WANDB_PROJECT") or "pretrain",
            "entity": entity,
        }
        self._given |= {"name": name, "tags": tags, "notes": notes}
        self._wishes = {"log_model": log_model, "alerts": alerts, "timeout": timeout}
        self._courier: SubprocessQueue | None = None
        self._over = False

    def check(self) -> None:
        """Raises ``UserError`` where the package is missing, or W&B online was asked for and there is no key."""
        require("wandb", sink="wandb")
        if self._asked() == "online" and not wandb_key.has_key():
            raise UserError(
                f"sink.wandb.mode=online: there is no key for {wandb_key.server()}: run `wandb login` or set "
                "WANDB_API_KEY; or sink.wandb.mode=offline, whose files `wandb sync` sends later"
            )

    def _asked(self) -> str | None:
        """The mode by the key, the environment or W&B's own settings (``wandb offline``), if any says it."""
        words = {"dryrun": "offline", "run": "online"}
        asked = self._mode or os.environ.get("WANDB_MODE") or wandb_key.mode()
        return words.get(asked, asked) if asked else None

    def open(self, run: Path, start: RunStarted) -> None:
        mode = self._asked() or ("online" if wandb_key.has_key() else "offline")
        if mode == "disabled":
            return
        if self._courier is None:
            if self._asked() is None and mode == "offline":
                notice(f"W&B: no key for {wandb_key.server()}, so this run is recorded offline")
            self._courier = SubprocessQueue("pretrain.telemetry.sinks.wandb_process", log=run / "logs" / "wandb.log")
        file, earlier = run / "metrics.jsonl", None
        if start.step > 0 and file.exists():
            earlier = records_until(file, start)
        order = {
            "mode": mode,
            "id": run_id(run, fresh=start.step == 0),
            "folder": str(run),
            "group": self._group or sweep_of(run),
            # W&B can't put two offline parts of a run together: each start writes the whole of it
            "records": earlier,
        }
        self._courier.send({"start": order | self._given | self._wishes})

    def write(self, record: Record) -> None:
        self._over = record["event"] == "run_finished"
        if self._courier is not None:
            self._courier.send({"record": record})

    def close(self) -> None:
        """The end of a run waits for W&B, for a while; a run that goes back to a checkpoint does not."""
        if self._courier is not None:
            self._courier.send({"end": None})
            if self._over:
                self._courier.finish(seconds=3 * self._timeout + GRACE_SECONDS)
                self._courier = None


def run_id(run: Path, *, fresh: bool) -> str:
    """The id in W&B of the run in that folder. ``fresh``: it begins, so it is another one than what was there before."""
    file = run / RUN_ID
    if fresh or not file.exists():
        replace_file(file, secrets.token_hex(4))
    return file.read_text()


def sweep_of(run: Path) -> str | None:
    """The name of the sweep that the run is a job of."""
    folder = run.resolve().parent
    return folder.name if (folder / "sweep.json").exists() else None
