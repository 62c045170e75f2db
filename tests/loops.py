"""The loop around a real engine, loader, guard and store; what scores and exports only writes down when it is asked."""

from dataclasses import dataclass, field
from pathlib import Path

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.rng import seed_everything
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.writer import AsyncCheckpointWriter
from pretrain.data.loader import Loader
from pretrain.evaluation.evaluation import Evaluation
from pretrain.evaluation.untouched import Untouched
from pretrain.telemetry.events import DomainScore
from pretrain.telemetry.interval import Interval
from pretrain.training.checkpoints import Checkpoints
from pretrain.training.guard.config import GuardConfig as GuardPolicy
from pretrain.training.guard.guard import Guard
from pretrain.training.trainer import Trainer
from tests.data.test_views import store_with
from tests.engines import ALONE, CPU, engine_of

RECORD = {"event": "train", "step": 1, "time": 1.0}
IDENTITY = dict.fromkeys(("model", "tokenizer", "data", "weights"), "x") | {
    "seed": 0,
    "optimizer": [],
    "sequence_length": 8,
    "global_batch": 4,
}


@dataclass
class Scores:
    """Scores the step's number. ``stop_at``: the calls at which a stop signal ends it."""

    stop_at: tuple[int, ...] = ()
    calls: list = field(default_factory=list)
    domains: list = field(default_factory=list)

    def run(self, engine, *, baseline, is_base, announce, interrupted, alive):
        alive()
        self.calls.append((baseline, announce, interrupted()))
        if len(self.calls) in self.stop_at:
            return None
        return [DomainScore("d", "new", 1.5 + len(self.calls), 2.0, None, 10, digest="g")]

    def capture_base(self, engine, **callbacks):
        pass


@dataclass
class Exports:
    when: list = field(default_factory=list)

    def checkpoint_files(self, progress):
        return {"card.md": f"step {progress.step}".encode()}

    def at_save(self, progress):
        self.when.append(("save", progress.step))

    def at_end(self, progress):
        self.when.append(("end", progress.step))
        return Path("model")


class Samples:
    def run(self, engine, *, interrupted, alive):
        return []


def loop_in(folder):
    """``loop_in(folder)(**changes)``: a trainer of six steps of two micro-batches of two rows, and the events it tells."""
    data, _ = store_with(folder, [[(n * 2**58, 10) for n in range(1, 30)]])
    for part in data.parts:
        assert int(part.tokens.max()) < 400

    def make(
        *,
        guard=GuardPolicy(),  # noqa: B008 (frozen)
        stop_at=(),
        keep=None,
        run="run",
        resume_from=None,
        evaluate_every=Interval(3),  # noqa: B008
        save_every=Interval(2),  # noqa: B008
        **changes,
    ):
        engine = engine_of()
        engine.grad_clip = 0.5
        loader = Loader(small(data.views(held_out=0.0)[0]), sequence_length=8, seed=0, batch_size=2, accumulation=2)
        events, scores = [], Scores(stop_at)
        store = CheckpointStore(folder / run / "checkpoints", CheckpointConfig(keep_last=keep))
        seed_everything(0)
        exporter = Exports()
        checkpoints = Checkpoints(
            AsyncCheckpointWriter(store, world=ALONE, background=False),
            IDENTITY,
            save_every,
            resume_from,
            unsaved_records=lambda: [RECORD],
            files=exporter.checkpoint_files,
        )
        given = {
            "steps": 6,
            "evaluation": Evaluation(Untouched(scores), Samples(), evaluate_every),
            "checkpoints": checkpoints,
            "guard": Guard(guard, device=CPU, quarantine=lambda bad: "documents"),
            "exporter": exporter,
            "metadata": {"fact": 1},
            "listeners": [events.append],
        }
        return Trainer(engine, loader, lambda step: 1.0 / (step + 1), **given | changes), events, scores

    return make


def small(view):
    """The same stream with numbers below the tiny model's 97."""
    keep = view.gather

    def gather(*arguments, **more):
        found = keep(*arguments, **more)
        found %= 97
        return found

    view.gather = gather
    return view
