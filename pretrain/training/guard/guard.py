"""The guard checks every step before it changes the weights, and decides what is done about the bad ones.

The device decides whether the update is applied, and the host reads the decision later: on a GPU it reads the verdict of a
step after the next step has been queued, so that the device never idles. It does so at the same step on every rank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.training.guard.config import GuardConfig
from pretrain.training.guard.spike_detector import FINE, NONFINITE, SpikeDetector


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step whose update was rejected.

    Attributes:
        step: its number, starting at 1.
        first_sample: index of the first sample of its batch.
        reason: the key of `GuardConfig` that applies: "nonfinite" or "spike".
        action: the value of that key.
        loss: mean loss of the global batch (nats per target token).
        grad_norm: norm of the gradients.
        zscore: robust standard deviations above the median.
    """

    step: int
    first_sample: int
    reason: str
    action: str
    loss: float
    grad_norm: float
    zscore: float

    def __str__(self) -> str:
        spike = "" if self.reason == "nonfinite" else f" ({self.zscore:.1f} robust standard deviations up)"
        return f"step {self.step}: loss {self.loss:.4g}{spike}, gradient norm {self.grad_norm:.4g}"


@dataclass(slots=True)
class StepCheck:
    """The check of one step before its update. All tensors are 0-d and on the device.

    Attributes:
        detector: holds the losses of the steps before.
        loss: mean loss of the global batch.
        zscore: robust standard deviations of ``loss`` above the median.
        agree: maps this rank's verdict to the worst verdict of all ranks. A rank whose memory or device is faulty may
            compute other numbers, and one rank alone must not skip an update.
    """

    detector: SpikeDetector
    loss: Tensor
    zscore: Tensor
    agree: Callable[[Tensor], Tensor]
    _norm: Tensor | None = None
    _verdict: Tensor | None = None

    def should_skip(self, norm: Tensor) -> Tensor:
        """Return whether the update must be skipped, given the gradients' ``norm``: 0-d bool, equal on all ranks."""
        return self.verdict(norm) != FINE

    def verdict(self, norm: Tensor) -> Tensor:
        """Return FINE, NONFINITE or SPIKE: 0-d int64, equal on all ranks. This is a collective, once for each ``norm``."""
        if self._verdict is None or self._norm is not norm:
            self._norm, self._verdict = norm, self.agree(self.detector.verdict(self.loss, self.zscore, norm))
        return self._verdict


class Guard:
    """Checks every step and applies the policy to bad ones.

    ``quarantine`` records the batch of a bad step and returns a short list of its documents. ``agree`` is described in
    `StepCheck`. ``blocklist`` holds the first samples of the batches that caused a rollback; they are not trained.
    """

    def __init__(
        self,
        policy: GuardConfig,
        *,
        device: torch.device,
        quarantine: Callable[[BadStep], str] = lambda bad: f"the batch that starts at sample {bad.first_sample}",
        scaled: bool = False,
        agree: Callable[[Tensor], Tensor] = lambda verdict: verdict,
    ) -> None:
        self.policy = policy
        self.detector = SpikeDetector(policy, device=device, scaled=scaled)
        self.blocklist: set[int] = set()
        self._quarantine = quarantine
        self._agree = agree
        # After a skipped step it is not known whether the weights are good; the next step will show.
        self.last_step_skipped = False
        self._trained_since_rollback = True
        self._rollback_step = 0  # the step of the checkpoint that the last rollback restored
        self._current: StepCheck | None = None
        self._skips_in_a_row = 0
        self._late = device.type == "cuda"
        self._unread: deque[Callable[[], BadStep | None]] = deque()

    def should_skip(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return whether the update of a step must be skipped (0-d bool, equal on all ranks), given the mean ``loss`` of its
        global batch and the ``norm`` of its gradients."""
        return self.check(loss).should_skip(norm)

    def check(self, loss: Tensor) -> StepCheck:
        """Return the check of the step whose global batch has this mean ``loss``."""
        if self._current is None or self._current.loss is not loss:
            self._current = StepCheck(self.detector, loss, self.detector.zscore(loss), self._agree)
        return self._current

    def note(self, loss: Tensor, norm: Tensor, *, step: int, first_sample: int) -> None:
        """Keep the result of a step until `handle_bad_steps` reads it."""
        check = self.check(loss)
        verdict = check.verdict(norm)
        self.detector.accept(check.loss, verdict)
        numbers = torch.stack([verdict.float(), check.loss, norm, check.zscore]).to("cpu", non_blocking=True)
        copied = None
        if check.loss.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append(partial(self._read, step, first_sample, numbers, copied))

    def handle_bad_steps(self, *, at_once: bool) -> Iterator[BadStep]:
        """Yield the bad steps whose verdicts have been read, in order, after recording and reporting them.

        With ``at_once`` the verdicts of all steps are read, because the run is about to evaluate, save or end; this waits
        for the device. Raises ``UserError`` if the run has to stop.
        """
        while len(self._unread) > (self._late and not at_once):
            bad = self._unread.popleft()()
            if bad is None:
                self._skips_in_a_row = 0
                self.last_step_skipped, self._trained_since_rollback = False, True
                continue
            self.last_step_skipped = True
            documents = self._quarantine(bad)
            limit = self._limit(bad)
            if limit is not None:
                raise UserError(
                    f"guard.{limit}: {bad}; nothing of this step is saved; its documents: {documents} (quarantine.jsonl "
                    "has their text); the same command continues from the last checkpoint, with a lower lr, other data or "
                    "another guard setting"
                )
            notice(f"{bad}: not trained, {bad.action}; quarantine.jsonl has its documents: {documents}")
            yield bad

    def _read(self, step: int, first_sample: int, numbers: Tensor, copied: torch.cuda.Event | None) -> BadStep | None:
        if copied is not None:
            copied.synchronize()
        verdict, *rest = numbers.tolist()
        if verdict == FINE:
            return None
        reason = "nonfinite" if verdict == NONFINITE else "spike"
        if reason == "nonfinite" and all(math.isfinite(number) for number in rest[:2]):
            rest[1] = math.nan  # the numbers of another rank were not finite, so no rank made an update
        return BadStep(step, first_sample, reason, getattr(self.policy, reason), *rest)

    def _limit(self, bad: BadStep) -> str | None:
        """Count ``bad`` and return the setting that requires the run to stop now, if any."""
        if bad.action == "stop":
            return f"{bad.reason}=stop"
        if bad.action == "skip":
            self._skips_in_a_row += 1
            return _exceeded("max_skips_in_a_row", self.policy.max_skips_in_a_row, self._skips_in_a_row)
        self.blocklist.add(bad.first_sample)
        return _exceeded("max_rollbacks", self.policy.max_rollbacks, len(self.blocklist))

    def is_blocklisted(self, first_sample: int) -> bool:
        """Return whether the batch that starts at ``first_sample`` caused a rollback before. Such a batch is not trained."""
        found = first_sample in self.blocklist
        self.last_step_skipped |= found
        return found

    @property
    def restore_below(self) -> int | None:
        """A rollback restores the newest checkpoint of a step less than this (``None``: the newest one). If no step was trained
        since the last rollback, its checkpoint did not help, and an older one is needed."""
        return None if self._trained_since_rollback else self._rollback_step

    def note_rollback(self, step: int) -> None:
        """Note that the run was rolled back to the checkpoint of ``step``."""
        self.last_step_skipped, self._trained_since_rollback = True, False
        self._rollback_step = step

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. `handle_bad_steps` must have been called with ``at_once`` before."""
        assert not self._unread
        return {
            "losses": self.detector.state(),
            "skips_in_a_row": self._skips_in_a_row,
            "passed_over": sorted(self.blocklist),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state on resume or rollback. Blocklisted batches stay blocklisted. The state is empty in
        checkpoints of versions without a guard."""
        self._unread.clear()
        self.detector.load_state(state.get("losses", []))
        self._skips_in_a_row = state.get("skips_in_a_row", 0)
        self.blocklist |= set(state.get("passed_over", []))


def _exceeded(key: str, limit: int, count: int) -> str | None:
    return f"{key}={limit}" if count > limit else None
