"""How many documents of a dataset were read, and what became of them. All counts are in the cache: no document is read again."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.data.store.token_store import TokenView


@dataclass(frozen=True)
class DocumentCounts:
    """Numbers of documents of a dataset.

    Attributes:
        read: documents in the files, without empty ones.
        filtered: removed by ``dataset.where``.
        duplicates: removed by ``dataset.deduplicate``.
        held_out: held out for evaluation.
        trained: trained on.
    """

    read: int
    filtered: int
    duplicates: int
    held_out: int
    trained: int

    @classmethod
    def of(cls, train: TokenView, held_out: TokenView) -> DocumentCounts:
        """Return the counts of the store of two views, which `TokenStore.views` returned."""
        store = train.store
        filtered = sum(part.num_removed for part in store.parts)
        return cls(
            store.num_documents + filtered,
            filtered,
            train.num_duplicates,
            held_out.num_documents,
            train.num_documents,
        )

    @property
    def unused(self) -> int:
        """Documents that ``dataset.train_data_ratio`` leaves out."""
        return self.read - self.filtered - self.duplicates - self.held_out - self.trained

    def described(self) -> str | None:
        """Return what became of the documents as one line; ``None`` where none was removed."""
        if not self.filtered and not self.duplicates:
            return None
        counts = {
            "removed by dataset.where": self.filtered,
            "removed as duplicates": self.duplicates,
            "held out": self.held_out,
            "left out by train_data_ratio": self.unused,
            "to train on": self.trained,
        }
        return f"{self.read:,} documents: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
