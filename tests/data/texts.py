"""Text for tests out of what every Python carries."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

WORDS = " ".join(topics.values()).split()


def some_text(seed: int, num_words: int) -> str:
    """Words of Python's own help pages, another sequence for every seed, in paragraphs."""
    words = random.Random(seed).choices(WORDS, k=num_words)
    return "\n\n".join(" ".join(words[i : i + 60]) for i in range(0, len(words), 60))
