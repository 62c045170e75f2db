"""SIGKILL in every phase of a run: the same command, killed again and again, ends with the very run that was never killed."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.store import CheckpointStore
from pretrain.telemetry.run_file import read_run_file
from tests.runs import assert_same_run, at_call


@dataclass(frozen=True)
class Phase:
    """A kill at one of the first ``most`` calls of ``where`` (module:function) with a path among their arguments in which
    ``paths`` is found, ``before`` or ``after`` the work is done. ``by``: the ranks that come there. ``resumed``: only a run
    that resumes from a checkpoint does."""

    where: str
    most: int
    paths: str = ""
    when: tuple[str, ...] = ("before", "after")
    by: tuple[str, ...] = ("0",)
    resumed: bool = False


BOTH = ("0", "1")
PHASES = {
    "tokenizing": Phase("pretrain.data.store.token_shards:PartWriter.append", 40),
    "resuming": Phase("pretrain.training.trainer:Trainer.restore", 1, by=BOTH, resumed=True),
    "evaluating": Phase("pretrain.strategy.engine:InferenceEngine.forward", 20, by=BOTH),
    "sampling": Phase("pretrain.strategy.engine:InferenceEngine.next_tokens", 40, by=BOTH),
    "forward and backward": Phase("pretrain.strategy.engine:Engine.backward", 30, by=BOTH),
    "update": Phase("pretrain.strategy.engine:Engine.update", 15, by=BOTH),
    "writing a record": Phase("pretrain.telemetry.sinks.jsonl:Jsonl.write", 20),
    "writing a file of a checkpoint": Phase("pretrain.distributed.sharding:write", 6, "/checkpoints/", by=BOTH),
    "before the marker": Phase("pretrain.checkpoint.atomic:_complete", 3, "/checkpoints/", when=("before",)),
    "between rename and prune": Phase("pretrain.checkpoint.store:CheckpointStore._prune", 3, when=("before",)),
    "replacing a checkpoint": Phase("os:rename", 1, r"/checkpoints/\S+\.replaced$", when=("after",), resumed=True),
    "removing a checkpoint": Phase("pretrain.checkpoint.store:CheckpointStore._remove", 1),
    "exporting": Phase("pretrain.training.exporter:write_files", 3),
    "any moment": Phase("", 0),
}
SINGLE = {"single": []}
PAIRS = {name: [f"strategy={name}", "devices=2", "batch_size=1"] for name in ("ddp", "fsdp")}
KILLS, KILLS_A_RUN = 25, 5


class Killer:
    """Kills runs, and counts the phases in which it did."""

    def __init__(self, spawn, draw, folder):
        self.spawn, self.draw, self.folder = spawn, draw, folder
        self.hits = Counter(dict.fromkeys(draw.sample(sorted(PHASES), len(PHASES)), 0))
        self.starts = 0

    def finish(self, arguments):
        process = self.spawn(arguments)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out

    def phase(self, run):
        """The one that was hit least, of those that ``run`` can come to."""
        whole = CheckpointStore(run / "checkpoints").complete_steps()
        return min((p for p in self.hits if whole or not PHASES[p].resumed), key=self.hits.__getitem__)

    def kill(self, name, arguments, run, *, ranks, seconds):
        """Start a run of so many ``ranks``, which undisturbed takes ``seconds``, and kill it in the phase ``name``; whether it
        came to that."""
        self.starts += 1
        if name == "any moment":
            return self._at_any_moment(arguments, self.draw.uniform(0.2, 1.05) * seconds, name)
        if name == "tokenizing":
            os.environ["PRETRAIN_CACHE"] = str(self.folder / f"cache-{self.starts}")
        if name == "replacing a checkpoint":
            for marker in (run / "checkpoints").glob("step-*[0-9]/COMPLETE.json"):
                os.truncate(marker, 10)  # the run starts anew and saves them again
        phase, mark = PHASES[name], self.folder / f"mark-{self.starts}"
        fault = self.draw.choice(("kill", "kill all"))
        moment = {"at": self.draw.randint(1, phase.most), "after": self.draw.choice(phase.when) == "after"}
        moment["rank"] = self.draw.choice([rank for rank in phase.by if int(rank) < ranks])
        environment = at_call(phase.where, fault, mark, paths=phase.paths, **moment)
        process = self.spawn(arguments, env=environment, start_new_session=True)
        out, _ = process.communicate(timeout=300)
        came, one_of_two = mark.exists(), ranks > 1 and fault == "kill"
        assert process.returncode == (0 if not came else 1 if one_of_two else -signal.SIGKILL), out
        assert not one_of_two or not came or "SIGKILL" in out or "exit code -9" in out, out
        self.hits[name] += came
        return came

    def _at_any_moment(self, arguments, seconds, name):
        process = self.spawn(arguments, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.hits[name] += 1
            return True
        assert process.returncode == 0, process.communicate()[0]
        return False


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [SINGLE, PAIRS], ids=["single", "pairs"])
def test_kill_9_in_every_phase(strategies, base_arguments, spawn, tmp_path, monkeypatch):
    """At a call drawn at random, five times a run; of two processes one or all. PRETRAIN_KILL_SEED repeats a draw."""
    seed = int(os.environ.get("PRETRAIN_KILL_SEED", time.time_ns() % 10**6))
    print(f"PRETRAIN_KILL_SEED={seed}")
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    killer = Killer(spawn, random.Random(seed), tmp_path)
    given = {name: [*base_arguments, "checkpoint.export=save", *more] for name, more in strategies.items()}
    seconds = {}
    for name, arguments in given.items():
        began_at = time.monotonic()
        killer.finish([*arguments, f"output_dir={tmp_path / name}"])
        seconds[name] = time.monotonic() - began_at
    for number, name in enumerate(cycle(strategies)):
        run = tmp_path / f"run-{number}"
        arguments, ranks = [*given[name], f"output_dir={run}"], 1 if strategies is SINGLE else 2
        left = min(KILLS_A_RUN, max(KILLS - killer.hits.total(), 1))
        if all(killer.kill(killer.phase(run), arguments, run, ranks=ranks, seconds=seconds[name]) for _ in range(left)):
            killer.finish(arguments)
        assert_same_run(run, tmp_path / name)
        ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (run, tmp_path / name))
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in theirs)
        if killer.hits.total() >= KILLS and all(killer.hits.values()):
            break
    print(dict(killer.hits))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "phase", "at"), [("fsdp", "writing a file of a checkpoint", 4), ("ddp", "evaluating", 12)]
)
def test_a_rank_that_is_killed_and_a_group_that_comes_back(strategy, phase, at, base_arguments, spawn, tmp_path):
    """By itself: ``launch.max_restarts``."""
    arguments = [*base_arguments, *PAIRS[strategy], "launch.max_restarts=1"]
    whole, run, mark = (tmp_path / name for name in ("whole", "run", "mark"))
    where, paths = PHASES[phase].where, PHASES[phase].paths
    for folder, environment in ((whole, None), (run, at_call(where, "kill", mark, at=at, rank="1", paths=paths))):
        process = spawn([*arguments, f"output_dir={folder}"], env=environment)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    assert mark.exists()
    assert "rank 1 was killed by SIGKILL" in out
    assert read_run_file(run)["restarts"] == 1
    assert_same_run(run, whole)
