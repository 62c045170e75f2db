"""What a run will read of each part of its training data: the table before the start, and what to say about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pretrain.data.best_fit import BestFitBlocks
from pretrain.data.store.near_duplicates import nearly_common
from pretrain.data.store.token_store import TokenView
from pretrain.data.training_data import Part, TrainingData

MANY_EPOCHS = 4  # repeated text is nearly as good as new up to here (Muennighoff et al., arXiv:2305.16264)
MOST_EPOCHS = 20  # what a scarce part of a mixture bears (arXiv:2605.12715)
MAX_HASHES = 2**21  # documents of a part that are compared with those of others


@dataclass(frozen=True)
class PlannedPart:
    """What a run will read of one part.

    Attributes:
        part: the part.
        tokens: target tokens over the whole run.
        epochs: passes over the part over the whole run.
        shares: its share of the target tokens in each phase.
    """

    part: Part
    tokens: int
    epochs: float
    shares: tuple[float, ...]


def planned_parts(
    train: TrainingData, *, steps: int, global_batch: int, sequence_length: int, document_mask: bool
) -> list[PlannedPart]:
    """Return what a run of ``steps`` steps will read of each part."""
    samples = train.samples_taken(
        steps=steps, global_batch=global_batch, sequence_length=sequence_length, document_mask=document_mask
    )
    found = []
    for i, (part, count, blocks) in enumerate(zip(train.parts, samples, train.blocks(sequence_length), strict=True)):
        tokens = round(count * blocks.mean_targets(document_mask=document_mask))
        shares = tuple(phase.shares[i] for phase in train.phases)
        found.append(PlannedPart(part, tokens, count / max(len(blocks), 1), shares))
    return found


def table_and_warnings(planned: Sequence[PlannedPart], train: TrainingData, *, steps: int) -> list[str]:
    """Return the table of the parts and the warnings about them, as lines; none for a single part."""
    if len(planned) < 2:
        return []
    begins = [f"from step {round(phase.start * steps):,}" for phase in train.phases[1:]]
    rows = [["part", "training tokens", "weight", *begins, "epochs"]]
    for row in planned:
        shares = [f"{share:.1%}" for share in row.shares]
        rows.append([row.part.name, f"{row.part.view.num_tokens:,}", *shares, f"{row.epochs:.2f}"])
    return [*aligned(rows), *_warnings(planned), *_common(train.parts)]


def padding(train: TrainingData, sequence_length: int) -> list[str]:
    """Return a line for each part with best-fit packing that says how much of it is padding."""
    packed = ((part.name, part.blocks(sequence_length)) for part in train.parts)
    return [
        f"dataset {name!r}: best-fit packing into {len(blocks):,} sequences; {blocks.padding:.2%} of their positions are padding"
        for name, blocks in packed
        if isinstance(blocks, BestFitBlocks)
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines, the first column aligned on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _warnings(planned: Sequence[PlannedPart]) -> Iterator[str]:
    for row in planned:
        seen = f"part {row.part.name!r} will be seen {row.epochs:.1f} times"
        if row.epochs > MOST_EPOCHS:
            yield f"{seen}: more than the 15 to 20 that even a scarce part of a mixture bears (arXiv:2605.12715)"
        elif row.epochs > MANY_EPOCHS:
            yield (
                f"{seen}: text that is repeated more than {MANY_EPOCHS} times teaches less each time (arXiv:2305.16264); a "
                "scarce part of a mixture bears 15 to 20 (arXiv:2605.12715)"
            )


def _common(parts: Sequence[Part]) -> Iterator[str]:
    """Yield a line for each pair of parts with the same documents, which are then trained on more often than the table says."""
    documents = sum(part.view.num_documents for part in parts)
    share = min(1.0, MAX_HASHES / max(documents, 1))
    hashes = [_hashes(part.view, share) for part in parts]
    for (one, ours), (other, theirs) in combinations(zip(parts, hashes, strict=True), 2):
        common = len(np.intersect1d(ours, theirs, assume_unique=True))
        if common:
            number = f"{common:,}" if share == 1 else f"about {round(common / share):,}"
            yield f"parts {one.name!r} and {other.name!r} have {number} documents in common, which are trained on in both"
        if one.near and other.near and documents <= MAX_HASHES and (near := nearly_common(one.view, other.view)):
            yield (
                f"{near:,} documents of part {other.name!r} are near duplicates of documents of part {one.name!r}: "
                "deduplicate=near compares the documents within one part; to keep one of them, make both one part, whose "
                "nameOrPath is a list"
            )


def _hashes(view: TokenView, share: float) -> NDArray[np.uint64]:
    """Return the hashes of the different documents of ``view``, of a fraction ``share`` of them, the same in every view."""
    limit = np.uint64(min(int(share * 2**32), 2**32 - 1))
    found = [np.empty(0, np.uint64)]
    for hashes in view.hashes():
        found.append(hashes if share == 1 else hashes[(hashes & np.uint64(2**32 - 1)) <= limit])
    return np.unique(np.concatenate(found))
