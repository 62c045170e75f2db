"""A probe of in-context learning: how much better a model predicts a random span when it has already seen it in its context.

In-context learning can be lost early in continual pretraining while the perplexity stays fine (arXiv:2506.00288). The probe needs
no text: random tokens can be predicted from the context alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pretrain.data.batch import IGNORE, Batch

if TYPE_CHECKING:
    from pretrain.strategy.engine import InferenceEngine

ROWS = 8
SPAN = 64  # tokens of a span at most
SEED = 20240601  # of the random tokens: the same for every run, so that runs can be compared


@dataclass(frozen=True)
class InContextProbe:
    """Rows of two equal random spans.

    Attributes:
        first: rows of the first copy alone, whose tokens are the targets.
        second: rows of both copies, with the tokens of the second one as targets.
    """

    first: Sequence[Batch]
    second: Sequence[Batch]

    def gain(self, engine: InferenceEngine) -> float:
        """Return the loss of the first copy minus that of the second, in nats per token: 0 for a model that does not use its
        context. All ranks must call this, with the model in eval mode; every rank scores all rows."""
        device = engine.world.device

        def loss(batches: Sequence[Batch]) -> float:
            summed = torch.stack([engine.evaluate(batch.to(device)).double() for batch in batches]).sum()
            return float(summed) / sum(batch.num_targets for batch in batches)

        return loss(self.first) - loss(self.second)


def in_context_probe(
    *, vocabulary: int, excluded: Sequence[int], start: int, sequence_length: int, batch_size: int
) -> InContextProbe | None:
    """Return the probe for a tokenizer of ``vocabulary`` tokens; ``None`` if it or the sequences are too short.

    ``excluded`` are the special tokens, which no span has. Every row begins with the token ``start``. A row is at most
    ``sequence_length`` long, a batch has at most ``batch_size`` rows.
    """
    allowed = torch.tensor(sorted(set(range(vocabulary)) - set(excluded)))
    span = min(SPAN, sequence_length // 2)
    if len(allowed) < 2 or span < 2:
        return None
    generator = torch.Generator().manual_seed(SEED)
    spans = allowed[torch.randint(len(allowed), (ROWS, span), generator=generator)]
    tokens = torch.cat([torch.full((ROWS, 1), start), spans, spans], dim=1)
    halves = []
    for start_of_targets in (0, span):  # later tokens do not matter to a causal model
        row = tokens[:, : start_of_targets + span + 1]
        labels = row[:, 1:].clone()
        labels[:, :start_of_targets] = IGNORE
        rows = zip(row[:, :-1].split(batch_size), labels.split(batch_size), strict=True)
        halves.append([Batch(ids, label, None, len(ids) * span) for ids, label in rows])
    return InContextProbe(*halves)
