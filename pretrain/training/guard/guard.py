"""Looks at every step before it changes the weights, and says what is to be done about the bad ones.

The device decides whether an update is made; the host hears of it later. On a GPU it reads a step's verdict when the next
step has been queued, so that the device never idles; which step that is, is the same on every rank.
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
    """A step without an update. ``step``: its number, from 1. ``first_sample``: of its batch. ``reason``: the policy's key."""

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
    """What is known of a step before its update: 0-d tensors on the device. The ``judge`` knows the steps before it.

    ``agree``: a verdict → the worst one that a rank has come to: on a rank whose memory or device is at fault these
    numbers may be others, and one rank alone must not leave an update out.
    """

    judge: SpikeDetector
    loss: Tensor
    zscore: Tensor
    agree: Callable[[Tensor], Tensor]
    _norm: Tensor | None = None
    _verdict: Tensor | None = None

    def should_skip(self, norm: Tensor) -> Tensor:
        """Whether gradients of this ``norm`` must not change the weights, 0-d bool, equal on all ranks."""
        return self.verdict(norm) != FINE

    def verdict(self, norm: Tensor) -> Tensor:
        """FINE, NONFINITE or SPIKE, 0-d int64, equal on all ranks. A collective, once for each ``norm``."""
        if self._verdict is None or self._norm is not norm:
            self._norm, self._verdict = norm, self.agree(self.judge.verdict(self.loss, self.zscore, norm))
        return self._verdict


class Guard:
    """``quarantine`` writes down the batch of a bad step and returns its documents in a few words.

    ``passed_over``: first samples of the batches that the run went back for; they are not trained. ``agree``: see `StepCheck`.
    """

    def __init__(
        self,
        policy: GuardConfig,
        *,
        device: torch.device,
        quarantine: Callable[[BadStep], str],
        scaled: bool = False,
        agree: Callable[[Tensor], Tensor] = lambda verdict: verdict,
    ) -> None:
        self.policy = policy
        self.judge = SpikeDetector(policy, device=device, scaled=scaled)
        self.passed_over: set[int] = set()
        self._quarantine = quarantine
        self._agree = agree
        self.last_step_skipped = (
            False  # the last step was not trained: what the weights are worth the next one will show
        )
        self.trained_since_rollback = True  # a step has been trained since the run went back
        self._skips_in_a_row = 0
        self._late = device.type == "cuda"
        self._unread: deque[Callable[[], BadStep | None]] = deque()

    def look(self, loss: Tensor) -> StepCheck:
        """Look at the ``loss`` of a step, that of the whole global batch, before the update."""
        return StepCheck(self.judge, loss, self.judge.zscore(loss), self._agree)

    def note(self, look: StepCheck, norm: Tensor, *, step: int, first_sample: int) -> None:
        """Keep what came of a step until `found` reads it."""
        verdict = look.verdict(norm)
        self.judge.accept(look.loss, verdict)
        numbers = torch.stack([verdict.float(), look.loss, norm, look.zscore]).to("cpu", non_blocking=True)
        copied = None
        if look.loss.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append(partial(self._read, step, first_sample, numbers, copied))

    def found(self, *, at_once: bool) -> Iterator[BadStep]:
        """The bad steps that have become known, in order, written down and told. ``at_once``: up to the very last step,
        because the run is about to evaluate, save or end; the device is waited for.

        Raises ``UserError`` when the run is to stop.
        """
        while len(self._unread) > (self._late and not at_once):
            bad = self._unread.popleft()()
            if bad is None:
                self._skips_in_a_row = 0
                self.last_step_skipped, self.trained_since_rollback = False, True
                continue
            self.last_step_skipped = True
            documents = self._quarantine(bad)
            limit = self._limit(bad)
            if limit is not None:
                raise UserError(
                    f"guard.{limit}: {bad}; nothing of this step is saved; its documents: {documents} (quarantine.jsonl "
                    "has their text); the same command goes on from the last checkpoint, with a lower lr, other data or "
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
            rest[1] = math.nan  # another rank's: nobody's gradients are trained
        return BadStep(step, first_sample, reason, getattr(self.policy, reason), *rest)

    def _limit(self, bad: BadStep) -> str | None:
        """Count ``bad``; the setting by which the run must stop now, if any."""
        if bad.action == "stop":
            return f"{bad.reason}=stop"
        if bad.action == "skip":
            self._skips_in_a_row += 1
            return _exceeded("max_skips_in_a_row", self.policy.max_skips_in_a_row, self._skips_in_a_row)
        self.passed_over.add(bad.first_sample)
        return _exceeded("max_rollbacks", self.policy.max_rollbacks, len(self.passed_over))

    def is_blocklisted(self, first_sample: int) -> bool:
        """Whether the batch that begins there is one that the run went back for: it is not trained."""
        found = first_sample in self.passed_over
        self.last_step_skipped |= found
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. Everything has been read before: `found` at once."""
        assert not self._unread
        return {
            "losses": self.judge.state(),
            "skips_in_a_row": self._skips_in_a_row,
            "passed_over": sorted(self.passed_over),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's, or go back to it: what is passed over stays so. Empty: it is of before there was one."""
        self._unread.clear()
        self.judge.load_state(state.get("losses", []))
        self._skips_in_a_row = state.get("skips_in_a_row", 0)
        self.passed_over |= set(state.get("passed_over", []))


def _exceeded(key: str, limit: int, count: int) -> str | None:
    return f"{key}={limit}" if count > limit else None
