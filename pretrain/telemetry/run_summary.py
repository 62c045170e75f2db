"""What the records of a run come to so far: before and after of each domain, the losses, where the time went."""

from __future__ import annotations

from collections import deque

from pretrain.telemetry.record import STEP_PARTS, WINDOW_PARTS, Record, scored_before

KEPT = 100  # log steps whose loss is kept, of however many: a terminal's curve has a column for each


class RunSummary:
    """``after``: the last evaluation of each domain; ``before``: that of the untouched model on the same text. ``samples``:
    the first and the last sample of each domain and each of the user's prompts. ``losses``: (step, loss or None) of the last
    log steps, the mean since the one before where it is known."""

    def __init__(self) -> None:
        self.before: dict[str, Record] = {}
        self.after: dict[str, Record] = {}
        self.samples: dict[tuple[str, str], tuple[Record, Record]] = {}
        self.losses: deque[tuple[int, float | None]] = deque(maxlen=KEPT)
        self.seconds: dict[str, float] = {}
        self.memory_gib: dict[str, float] = {}
        self._step = 0

    def add(self, record: Record) -> None:
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

    def has_beyond(self, step: int) -> bool:
        """Whether a domain was scored at a later step, which a run that goes back to ``step`` has not come to."""
        return any(record["step"] > step for record in self.after.values())

    def start(self, step: int) -> None:
        """Training goes on, or on again, at ``step``."""
        self.losses = deque((point for point in self.losses if point[0] <= step), maxlen=KEPT)
        self._step = step

    def _train(self, r: Record) -> None:
        steps, self._step = r["step"] - self._step, r["step"]
        self.losses.append((r["step"], r.get("loss_mean", r.get("loss"))))
        self._spent("step", (r.get("step_seconds") or 0.0) * steps)
        for part in STEP_PARTS:
            self._spent(part, (r.get(f"{part}_seconds") or 0.0) * steps)
        for pause in WINDOW_PARTS:
            self._spent(pause, r.get(f"{pause}_seconds") or 0.0)
        on_host = r.get("memory_reserved_gib") is None  # then all of it is the host's
        for kind in ("memory_gib",) if on_host else ("memory_gib", "host_memory_gib"):
            if r.get(kind) is not None:
                self.memory_gib[kind] = max(self.memory_gib.get(kind, 0.0), r[kind])

    def _spent(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def spent(self) -> dict[str, float]:
        """All seconds that are accounted for, by what they went into, the parts of a step first; its rest is ``other``,
        or ``training`` where the records don't say how long the forward and the backward took."""
        parts = {name: self.seconds.get(name, 0.0) for name in (*STEP_PARTS, *WINDOW_PARTS)}
        rest = self.seconds.get("step", 0.0) - sum(parts[name] for name in STEP_PARTS)
        named = parts | {"other" if parts["compute"] else "training": max(0.0, rest)}
        return {
            name: named[name] for name in ("training", *STEP_PARTS, "other", *WINDOW_PARTS) if named.get(name, 0.0) > 0
        }
