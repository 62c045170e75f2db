"""What monitoring costs: training steps of the default run beside the same loop that nobody watches.

    python scripts/bench_monitor.py [--rounds 10] [--steps 20] [key=value ...]

Two trainers of the default run in one process, one with the clock and the listeners that a run has (monitor, console, jsonl,
report, run.json), one with neither, take turns of ``--steps`` steps; nothing is evaluated or saved. Turns are short and
alternate, so that whatever else the machine does falls on both; which one begins changes every round. The first round is
not counted. Processor time is told beside wall time, as it hardly depends on the rest of the machine, and so is the part of
it that listeners and clock take. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program does on a CPU


from pretrain.checkpoint.store import CheckpointStore
from pretrain.config.compose import run_config
from pretrain.data.batch import Batch
from pretrain.distributed.rank_info import RankInfo
from pretrain.run import build
from pretrain.run.build_trainer import build_trainer
from pretrain.run.prepare import prepare
from pretrain.telemetry.events import Event, RunStarted
from pretrain.telemetry.step_timer import StepTimer, StepTimes
from pretrain.training.trainer import Trainer

OWN = ["max_steps=1000000", "evaluation=new_only", "evaluate_every=null", "save_every=null"]


class NoClock(StepTimer):
    def part(self, part: str) -> Any:
        return nullcontext()

    def take(self) -> StepTimes:
        return StepTimes()


@dataclass
class Turn:
    """Seconds a step: by the wall, of all processors, and of this thread's processor in the listeners."""

    wall: float
    processor: float
    listening: float


class Contestant:
    def __init__(self, trainer: Trainer, *, watched: bool) -> None:
        self.trainer, self.batches, self._listening = trainer, trainer.batches(), 0.0
        if watched:
            trainer.emit(RunStarted(0, trainer.steps, resumed=False, facts=trainer.metadata))
        else:
            trainer.listeners, trainer.engine.timer = [], NoClock()

    def turn(self, steps: int) -> Turn:
        """What `Trainer.run` does in a step, ``steps`` times."""
        self._listening, started_at, worked_at = 0.0, time.perf_counter(), time.process_time()
        for batch in self._some(steps):
            event = self.trainer.train_step(batch)
            self._emit(event)
            self.trainer.sync_stop_signal()
            list(self.trainer.guard.handle_bad_steps(at_once=False))
        wall, processor = time.perf_counter() - started_at, time.process_time() - worked_at
        return Turn(wall / steps, processor / steps, self._listening / steps)

    def _some(self, steps: int) -> Iterator[Batch]:
        return (next(self.batches) for _ in range(steps))

    def _emit(self, event: Event) -> None:
        started_at = time.thread_time()
        self.trainer.emit(event)
        self._listening += time.thread_time() - started_at


def trainer_of(arguments: list[str], folder: Path) -> Trainer:
    config = run_config([*OWN, *arguments, f"output_dir={folder}"]).with_lr(1e-3)
    folder.mkdir()
    world = build.build_world(config, RankInfo(), group=False)
    store = CheckpointStore(folder / "checkpoints", config.checkpoint)
    return build_trainer(config, prepare(config), store, world)


def clock_seconds(parts: int = 6, count: int = 2000) -> float:
    """Processor time of a step's clock: ``parts`` measured, taken, and read at the log step."""
    clock, started_at = StepTimer(), time.thread_time()
    for _ in range(count):
        for _ in range(parts):
            with clock.part("compute"):
                pass
        clock.take().seconds()
    return (time.thread_time() - started_at) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="after a first one")
    parser.add_argument("--steps", type=int, default=20, help="of one turn")
    asked, overrides = parser.parse_known_args()
    measured: dict[str, list[Turn]] = {"watched": [], "unwatched": []}
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        trainers = {who: trainer_of(overrides, Path(name) / who) for who in measured}
        contestants = {who: Contestant(trainer, watched=who == "watched") for who, trainer in trainers.items()}
        for number in range(asked.rounds + 1):
            for who in list(measured)[:: 1 if number % 2 else -1]:
                measured[who].append(contestants[who].turn(asked.steps))
    watched, unwatched = (turns[1:] for turns in measured.values())
    print("\n".join(table(watched, unwatched)))
    own = statistics.mean(turn.listening for turn in watched) + clock_seconds()
    share = own / statistics.median(turn.processor for turn in unwatched)
    print(f"\nlisteners and clock: {own * 1e3:.3f} ms of processor time a step, {share:.2%} of an unwatched step's")


def table(watched: list[Turn], unwatched: list[Turn]) -> Iterator[str]:
    yield "| time of a step | watched ms | unwatched ms | ratio of medians | median ratio of a round (least, most) |"
    yield "|---|---|---|---|---|"
    for name in ("wall", "processor"):
        ours, theirs = ([getattr(turn, name) for turn in turns] for turns in (watched, unwatched))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        medians = statistics.median(ours), statistics.median(theirs)
        yield (
            f"| {name} | {medians[0] * 1e3:.1f} | {medians[1] * 1e3:.1f} | {medians[0] / medians[1]:.3f} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f}) |"
        )


if __name__ == "__main__":
    main()
