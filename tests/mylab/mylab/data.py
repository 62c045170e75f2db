"""A dataset that is a generator of documents."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain import Source


@dataclass(frozen=True, kw_only=True)
class Stories(Source):
    """Stories, drawn at random from the words of ``vocabulary``."""

    vocabulary: str
    count: int = 40

    def fingerprint(self) -> str:
        return f"{self.vocabulary} {self.count}"

    def documents(self) -> Iterator[str]:
        draw = random.Random(0)
        for _ in range(self.count):
            yield " ".join(draw.choices(self.vocabulary.split(), k=300))
