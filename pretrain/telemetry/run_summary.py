"""Aggregate the records of a run: the first and last scores of each domain, the latest losses, and the time by part."""

from __future__ import annotations

from collections import deque

from pretrain.telemetry.record import STEP_PARTS, WINDOW_PARTS, Record, scored_before

MAX_LOSSES = 100  # log steps whose loss is kept: the curve on a terminal shows one per column


class RunSummary:
    """A running summary of the records of a run.

    Attributes:
        before: Evaluation of the base model (before training) of each domain, on the same text as ``after``.
        after: Last evaluation of each domain.
        samples: First and last sample of each domain and of each of the user's prompts.
        losses: (step, loss or None) of the last log steps: the mean since the previous log step, if the record has it.
        seconds: Seconds by part.
        memory_gib: Peak memory in GiB by kind.
    """

    def __init__(self) -> None:
        self.before: dict[str, Record] = {}
        self.after: dict[str, Record] = {}
        self.samples: dict[tuple[str, str], tuple[Record, Record]] = {}
        self.losses: deque[tuple[int, float | None]] = deque(maxlen=MAX_LOSSES)
        self.seconds: dict[str, float] = {}
        self.memory_gib: dict[str, float] = {}
        self._step = 0

    def add(self, record: Record) -> None:
        """Add the next record of the run."""
        match record["event"]:
            case "train":
                self._train(record)
            case "evaluation":
                domain = record["domain"]
                self.before[domain] = scored_before(self.before.get(domain), record)
                self.after[domain] = record
            case "sample":
                key = (record["domain"], record["prompt"] if record["role"] == "user" else "")
                first, last = self.samples.setdefault(key, (record, record))
                if record["step"] > last["step"]:
                    self.samples[key] = (first, record)

    def scored_after(self, step: int) -> bool:
        """Return whether any domain was scored after ``step``; a rollback to ``step`` discards those scores."""
        return any(record["step"] > step for record in self.after.values())

    def start(self, step: int) -> None:
        """Training starts or resumes at ``step``."""
        self.losses = deque((point for point in self.losses if point[0] <= step), maxlen=MAX_LOSSES)
        self._step = step

    def _train(self, r: Record) -> None:
        steps, self._step = r["step"] - self._step, r["step"]
        self.losses.append((r["step"], r.get("loss_mean", r.get("loss"))))
        self._add_seconds("step", (r.get("step_seconds") or 0.0) * steps)
        for part in STEP_PARTS:
            self._add_seconds(part, (r.get(f"{part}_seconds") or 0.0) * steps)
        for pause in WINDOW_PARTS:
            self._add_seconds(pause, r.get(f"{pause}_seconds") or 0.0)
        on_host = r.get("memory_reserved_gib") is None  # without a GPU, `memory_gib` is host memory
        for kind in ("memory_gib",) if on_host else ("memory_gib", "host_memory_gib"):
            if r.get(kind) is not None:
                self.memory_gib[kind] = max(self.memory_gib.get(kind, 0.0), r[kind])

    def _add_seconds(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def spent(self) -> dict[str, float]:
        """Return all measured seconds by part, the parts of a step first. The unattributed time of the steps is ``other``, or
        ``training`` if the records lack the time of forward and backward."""
        parts = {name: self.seconds.get(name, 0.0) for name in (*STEP_PARTS, *WINDOW_PARTS)}
        unattributed = self.seconds.get("step", 0.0) - sum(parts[name] for name in STEP_PARTS)
        named = parts | {"other" if parts["compute"] else "training": max(0.0, unattributed)}
        return {
            name: named[name] for name in ("training", *STEP_PARTS, "other", *WINDOW_PARTS) if named.get(name, 0.0) > 0
        }
