"""The training data of a run: one part, or several with the share of each, which may change from phase to phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.data.best_fit import best_fit_blocks
from pretrain.data.blocks import Blocks
from pretrain.data.changed_files import Files
from pretrain.data.draw import Draw
from pretrain.data.fim import FillInMiddle
from pretrain.data.store.token_store import TokenView
from pretrain.runtime.errors import UserError

PACKINGS: dict[str, Callable[[TokenView, int], Blocks]] = {"stream": Blocks, "best_fit": best_fit_blocks}


@dataclass(frozen=True)
class Part:
    """One part of the training data.

    Attributes:
        name: the key of the part in the config.
        view: the training documents as tokens.
        replay: whether it is old text, which is repeated against forgetting.
        loss_weight: factor of its tokens in the loss.
        max_epochs: the most passes over it; ``None``: any number.
        packing: how its documents become sequences: stream | best_fit.
        fim: how its documents are rearranged to learn filling in the middle; ``None``: not at all.
        near: whether it has only one of several near duplicates.
    """

    name: str
    view: TokenView
    replay: bool = False
    loss_weight: float = 1.0
    max_epochs: float | None = None
    packing: str = "stream"
    fim: FillInMiddle | None = None
    near: bool = False

    def blocks(self, sequence_length: int) -> Blocks:
        """Return the sequences of the part."""
        return PACKINGS[self.packing](self.view, sequence_length)


@dataclass(frozen=True)
class MixturePhase:
    """The shares of the parts from one point of the run on.

    Attributes:
        start: share of the run's steps at which the phase begins.
        shares: share of each part in the target tokens; their sum is 1.
    """

    start: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class TrainingData:
    """The parts and phases of the training data. The first phase starts at 0."""

    parts: tuple[Part, ...]
    phases: tuple[MixturePhase, ...] = (MixturePhase(0.0, (1.0,)),)

    @classmethod
    def of(cls, data: TokenView | TrainingData) -> TrainingData:
        """Return ``data``; a view is one part."""
        return cls((Part(data.store.name, data),)) if isinstance(data, TokenView) else data

    @property
    def num_tokens(self) -> int:
        return sum(part.view.num_tokens for part in self.parts)

    @property
    def num_documents(self) -> int:
        return sum(part.view.num_documents for part in self.parts)

    @property
    def num_bytes(self) -> int | None:
        """The bytes of text; ``None`` where the text of a part is not known."""
        found = [part.view.num_bytes for part in self.parts]
        return None if None in found else sum(size for size in found if size is not None)

    @property
    def files(self) -> Files:
        """The files that were read for all parts."""
        return {path: seen for part in self.parts for path, seen in part.view.store.files.items()}

    @property
    def copied_files(self) -> Files:
        """Those of ``files`` whose tokens are in the cache. The others are read in place, and checked at each access."""
        shards = (shard for part in self.parts for shard in part.view.store.parts)
        in_place = {shard.tokens_at[0] for shard in shards if shard.tokens_at}
        return {path: seen for path, seen in self.files.items() if path not in in_place}

    def blocks(self, sequence_length: int) -> list[Blocks]:
        """Return the sequences of each part."""
        return [part.blocks(sequence_length) for part in self.parts]

    def epoch_samples(self, sequence_length: int) -> float:
        """Return the samples in one pass over the new text: the sequences of all its parts, and the replayed ones among them."""
        lengths = [len(blocks) for blocks in self.blocks(sequence_length)]
        used = [any(phase.shares[i] for phase in self.phases) for i in range(len(self.parts))]
        new = sum(n for n, part, is_used in zip(lengths, self.parts, used, strict=True) if is_used and not part.replay)
        share = sum(
            length * phase.shares[i]
            for phase, length in zip(self.phases, self._phase_lengths(), strict=True)
            for i, part in enumerate(self.parts)
            if not part.replay
        )
        return new / share if len(self.parts) > 1 else new

    def draws(self, *, steps: int, global_batch: int, mean_targets: Sequence[float]) -> list[tuple[int, Draw]]:
        """Return the first sample and the draw of each phase of a run of ``steps`` steps.

        A sequence in which documents begin has fewer targets if their first tokens are not targets. Shares are those of
        target tokens, so such a part gets more sequences. ``mean_targets`` is the number of targets of its sequences.
        """
        found = []
        for phase in self.phases:
            of_samples = [share / max(mean, 1) for share, mean in zip(phase.shares, mean_targets, strict=True)]
            samples = phase.shares if len(set(mean_targets)) == 1 else of_samples
            found.append((round(phase.start * steps) * global_batch, Draw(samples)))
        return found

    def samples_taken(self, *, steps: int, global_batch: int, sequence_length: int, document_mask: bool) -> list[int]:
        """Return the samples of each part in a run of ``steps`` steps."""
        means = [blocks.mean_targets(document_mask=document_mask) for blocks in self.blocks(sequence_length)]
        phases = self.draws(steps=steps, global_batch=global_batch, mean_targets=means)
        ends = [start for start, _ in phases[1:]] + [steps * global_batch]
        taken = [draw.taken(end - start) for (start, draw), end in zip(phases, ends, strict=True)]
        return [int(count) for count in sum(taken[1:], taken[0])]

    def table(self, *, steps: int, global_batch: int) -> list[dict[str, Any]]:
        """Return the first sample of each phase and the shares of the parts in it, as a checkpoint keeps them."""
        return [
            {
                "first_sample": round(phase.start * steps) * global_batch,
                "shares": {part.name: share for part, share in zip(self.parts, phase.shares, strict=True)},
            }
            for phase in self.phases
        ]

    def _phase_lengths(self) -> list[float]:
        starts = [phase.start for phase in self.phases]
        return [end - start for start, end in zip(starts, [*starts[1:], 1.0], strict=True)]


def check_epochs(
    data: TrainingData, *, steps: int, global_batch: int, sequence_length: int, document_mask: bool
) -> None:
    """Raise ``UserError`` when a run of ``steps`` steps reads a part more often than its ``max_epochs`` allow."""
    if all(part.max_epochs is None for part in data.parts):
        return
    taken = data.samples_taken(
        steps=steps, global_batch=global_batch, sequence_length=sequence_length, document_mask=document_mask
    )
    for part, count, blocks in zip(data.parts, taken, data.blocks(sequence_length), strict=True):
        if part.max_epochs is not None and count > part.max_epochs * len(blocks):
            raise UserError(
                f"max_epochs={part.max_epochs:g} of part {part.name!r}: the run would read it {count / len(blocks):.3g} times: "
                f"{len(blocks) * sequence_length:,} tokens are there, and its share of the {steps:,} steps is "
                f"{count * sequence_length:,} tokens; lower its weight or the number of steps, or raise max_epochs"
            )


def _bytes(data: TrainingData) -> str:
    return "" if data.num_bytes is None else f", {data.num_bytes:,} bytes"


def check_enough(data: TrainingData, *, sequence_length: int, global_batch: int) -> None:
    """Raise ``UserError`` when the training documents do not fill one global batch (in sequences, over all workers), or a part
    has no sequence at all."""
    lengths = [len(each) for each in data.blocks(sequence_length)]
    if sum(lengths) < global_batch:
        name = data.parts[0].view.store.name if len(data.parts) == 1 else "+".join(part.name for part in data.parts)
        raise UserError(
            f"dataset {name!r}: too little text for one global batch: {data.num_tokens:,} training tokens "
            f"({data.num_documents:,} documents{_bytes(data)}) make {sum(lengths):,} sequences of "
            f"{sequence_length}, but batch_size × gradient_accumulation_steps × workers = {global_batch:,} sequences "
            f"need {global_batch * sequence_length + 1:,} tokens; lower one of these, lower sequence_length or add text"
        )
    for index, (part, length) in enumerate(zip(data.parts, lengths, strict=True)):
        if not length and any(phase.shares[index] for phase in data.phases):
            raise UserError(
                f"part {part.name!r} has too little text for its share: {part.view.num_tokens:,} training tokens do not fill "
                f"one sequence of {sequence_length}; lower sequence_length, add text, or leave the part out"
            )
