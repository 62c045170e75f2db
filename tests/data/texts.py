"""Text for tests out of what every Python carries."""

from __future__ import annotations

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

WORDS = " ".join(topics.values()).split()


def some_text(seed: int, num_words: int) -> str:
    """Words of Python's own help pages, another sequence for every seed, in paragraphs."""
    words = random.Random(seed).choices(WORDS, k=num_words)
    return "\n\n".join(" ".join(words[i : i + 60]) for i in range(0, len(words), 60))


TEXTS = [some_text(seed, 40) + ' "quoted", comma\nnew line, ñ 漢字 🙂' for seed in range(700)]


def parts_of(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.glob("parts/*/*.tokens"))}


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
