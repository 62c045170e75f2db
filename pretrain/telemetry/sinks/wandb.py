"""The sink for Weights & Biases. W&B runs in a subprocess (`wandb_process.py`), so that the training never waits for the
network or for W&B and shares no lock, signal or random number generator with it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import replace_file
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.record import Record
from pretrain.telemetry.sinks import wandb_key
from pretrain.telemetry.sinks.base import Sink, require
from pretrain.telemetry.sinks.jsonl import records_until
from pretrain.telemetry.sinks.subprocess_queue import SubprocessQueue

RUN_ID = ".wandb_run_id"  # in the run folder: every resumed start continues the same W&B run
GRACE_SECONDS = 15.0  # for W&B's processes to start and to exit
Mode = Literal["online", "offline", "disabled"]


class Wandb(Sink):
    """A sink that sends records to W&B.

    Attributes:
        mode: online · offline (`wandb sync` uploads later) · disabled; null: $WANDB_MODE, or online if there is an API
            key, else offline.
        project: W&B project; null: $WANDB_PROJECT, or pretrain.
        entity: User or team; null: your default entity.
        name: Name of the run in W&B.
        group: Group of the run; null: jobs of a sweep use the name of the sweep's folder.
        tags: Tags, as [a, b].
        notes: Longer description.
        log_model: true: upload the final model folder as an artifact.
        alerts: true: send alerts for skipped steps, for rollbacks, and when the run stops or fails.
        timeout: Seconds to wait for W&B's response at the start and for the remaining uploads at the end.
    """

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
        self._options = {"log_model": log_model, "alerts": alerts, "timeout": timeout}
        self._queue: SubprocessQueue | None = None
        self._over = False

    def check(self) -> None:
        """Raise ``UserError`` if the package is missing, or if online mode is configured and there is no key."""
        require("wandb", sink="wandb")
        if self._configured_mode() == "online" and not wandb_key.has_key():
            raise UserError(
                f"sink.wandb.mode=online: there is no key for {wandb_key.server()}: run `wandb login` or set "
                "WANDB_API_KEY; or sink.wandb.mode=offline, whose files `wandb sync` sends later"
            )

    def _configured_mode(self) -> str | None:
        """Return the configured mode: from the config key, the environment or W&B's own settings (``wandb offline``), in this
        order; ``None`` if none of them sets it."""
        words = {"dryrun": "offline", "run": "online"}
        configured = self._mode or os.environ.get("WANDB_MODE") or wandb_key.mode()
        return words.get(configured, configured) if configured else None

    def open(self, run: Path, start: RunStarted) -> None:
        mode = self._configured_mode() or ("online" if wandb_key.has_key() else "offline")
        if mode == "disabled":
            return
        if self._queue is None:
            if self._configured_mode() is None and mode == "offline":
                notice(f"W&B: no key for {wandb_key.server()}, so this run is recorded offline")
            self._queue = SubprocessQueue("pretrain.telemetry.sinks.wandb_process", log=run / "logs" / "wandb.log")
        file, earlier = run / "metrics.jsonl", None
        if start.step > 0 and file.exists():
            earlier = records_until(file, start)
        order = {
            "mode": mode,
            "id": run_id(run, fresh=start.step == 0),
            "folder": str(run),
            "group": self._group or sweep_of(run),
            # W&B can't merge two offline parts of a run, so each start writes all records of the run
            "records": earlier,
        }
        self._queue.send({"start": order | self._given | self._options})

    def write(self, record: Record) -> None:
        self._over = record["event"] == "run_finished"
        if self._queue is not None:
            self._queue.send({"record": record})

    def close(self) -> None:
        """Close the W&B run. At the end of a run this waits for W&B for a limited time; at a rollback it does not wait."""
        if self._queue is not None:
            self._queue.send({"end": None})
            if self._over:
                self._queue.finish(seconds=3 * self._timeout + GRACE_SECONDS)
                self._queue = None


def run_id(run: Path, *, fresh: bool) -> str:
    """Return the W&B id of the run in that folder. With ``fresh`` the run starts from step 0, so it gets a new id."""
    file = run / RUN_ID
    if fresh or not file.exists():
        replace_file(file, secrets.token_hex(4))
    return file.read_text()


def sweep_of(run: Path) -> str | None:
    """Return the name of the sweep that the run is a job of, or ``None``."""
    folder = run.resolve().parent
    return folder.name if (folder / "sweep.json").exists() else None
