"""Score the held-out documents by sequence in this process: the base model, and models between two others (`task=advise`).

The difference of two models on the same sequences has a standard error, which a mean loss alone does not give.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.schema import RunConfig
from pretrain.distributed.rank_info import RankInfo
from pretrain.run import build
from pretrain.run.build_evaluation import build_evaluator
from pretrain.runtime.out_of_memory import watched
from pretrain.runtime.strict_json import read_json
from pretrain.telemetry.run_file import write_json

if TYPE_CHECKING:
    from pretrain.run.prepare import Prepared


@dataclass(frozen=True)
class Scores:
    """The losses of one domain by sequence.

    Attributes:
        role: new or base.
        nats: Summed loss of each sequence.
        targets: Scored tokens of each sequence.
        num_bytes: Bytes of the scored text; ``None`` where they are unknown.
    """

    role: str
    nats: list[float]
    targets: list[int]
    num_bytes: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.targets)

    @property
    def loss(self) -> float:
        return sum(self.nats) / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        return sum(self.nats) / math.log(2) / self.num_bytes if self.num_bytes else None

    def change_error(self, base: Scores) -> float | None:
        """Return the standard error of the change of the loss from ``base``, over the sequences that both have scored; ``None``
        for fewer than two."""
        if len(self.nats) != len(base.nats) or len(self.nats) < 2:
            return None
        changes = [ours - theirs for ours, theirs in zip(self.nats, base.nats, strict=True)]
        mean, count = sum(changes) / self.tokens, len(changes)
        squares = sum((d - mean * n) ** 2 for d, n in zip(changes, self.targets, strict=True))
        return math.sqrt(squares * count / (count - 1)) / self.tokens


class ScoringModel:
    """A model in this process that scores the held-out documents of every domain."""

    def __init__(self, config: RunConfig, prepared: Prepared) -> None:
        from pretrain.run.tasks import out_of_memory_explained
        from pretrain.strategy.engine import count_parameters

        world = build.build_world(config, RankInfo(), group=False)
        self._explained = partial(out_of_memory_explained, RunConfig.of(config.plain | {"task": "evaluation"}), world)
        with self._explained():
            self.engine = build.build_scorer(config, prepared, world)
        self.evaluator = build_evaluator(config, replace(prepared, notices=()))
        self.parameters = count_parameters(self.engine.model)[0]

    def scores(self) -> dict[str, Scores]:
        """Score the model as it is."""
        from pretrain.data.batch import IGNORE
        from pretrain.evaluation.perplexity import evaluating

        found = {}
        with self._explained(), watched("evaluation"), evaluating(self.engine.model):
            for domain in self.evaluator.domains:
                nats: list[float] = []
                targets: list[int] = []
                for batch in domain.batches:
                    rows = self.engine.evaluate_rows(batch.to(self.engine.world.device))
                    nats += rows[:, 0].double().tolist()
                    targets += (batch.labels != IGNORE).sum(1).tolist()
                found[domain.name] = Scores(domain.role, nats, targets, domain.batches.num_bytes)
        return found

    def between(self, first: Any, second: Any, weight: float) -> dict[str, Scores]:
        """Score (1 - weight) × first + weight × second. Both are the weights in files of a model of this architecture."""
        import torch

        from pretrain.strategy.replaced import EngineWeights

        def blend(own: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.lerp(a.float(), b.float(), weight)

        with EngineWeights(self.engine).blended([first, second], blend):
            return self.scores()

    def close(self) -> None:
        """Free the model before other processes need the device."""
        import torch

        del self.engine, self.evaluator
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class ScoreCache:
    """Scores in ``scores.json``, so that the same command does not score a model again.

    ``identity`` is what they depend on besides the model: text, tokenizer and settings.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        self._file, self._identity = file, dict(identity)
        known = self._read()
        self._found: dict[str, dict[str, Scores]] = known if known is not None else {}

    def _read(self) -> dict[str, dict[str, Scores]] | None:
        try:
            content = read_json(self._file)
            if content["identity"] != self._identity:
                return None
            return {
                model: {name: Scores(**scores) for name, scores in domains.items()}
                for model, domains in content["scores"].items()
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

    def get(self, model: str) -> dict[str, Scores] | None:
        """Return the scores of a model, by its name here; ``None`` if there are none."""
        return self._found.get(model)

    def put(self, model: str, scores: dict[str, Scores]) -> dict[str, Scores]:
        """Keep and return the scores of a model."""
        self._found[model] = scores
        content = {m: {name: asdict(s) for name, s in domains.items()} for m, domains in self._found.items()}
        write_json(self._file, {"identity": self._identity, "scores": content})
        return scores


def losses_of(many: Sequence[Mapping[str, Scores]]) -> dict[str, list[float]]:
    """Return the losses of each domain in every one of several models."""
    return {name: [scores[name].loss for scores in many] for name in many[0]}
