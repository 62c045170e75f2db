"""What this program uses of the private parts of Hugging Face ``datasets`` (seen in 4.0.0 and 5.2.0). ``tests/test_internals.py``
fails when one of them has changed."""

from __future__ import annotations

from typing import Any


def fingerprint(dataset: Any) -> str:
    """Return the hash of the content of a ``datasets.Dataset`` and of the operations that made it."""
    return str(dataset._fingerprint)


def downloads_folder(builder: Any) -> str:
    """Return the folder into which a ``DatasetBuilder`` downloads files."""
    return str(builder._cache_downloaded_dir)
