"""quarantine.jsonl: the batches that were not trained, with their documents, so that users can inspect their text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.runtime.console import notice
from pretrain.runtime.files import replace_file
from pretrain.telemetry.record import json_safe
from pretrain.telemetry.sinks.jsonl import keep_broken, read_records
from pretrain.training.guard.guard import BadStep

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pretrain.data.loader import Loader
    from pretrain.data.store.token_store import DocumentOrigin

EXCERPT_CHARS = 200
NAMED = 3  # number of documents listed in a message


class Quarantine:
    """Writes one record per batch. The record of a step that is trained again replaces the earlier one.

    ``path`` is the file, or ``None`` on ranks that do not write it.
    """

    def __init__(self, path: Path | None, *, loader: Loader, tokenizer: Any) -> None:
        self._path = path
        self._loader = loader
        self._tokenizer = tokenizer

    def __call__(self, bad: BadStep) -> str:
        """Record the documents in the batch of ``bad``; return the first ones as ``path#index``."""
        found = list(self._loader.texts(bad.first_sample))
        if self._path is not None:
            try:
                self._write(self._record(bad, found))
            except (OSError, ValueError) as error:  # for example a full disk, which must not end the run
                notice(f"{self._path} can't be written: {error}; the run continues")
        names = ", ".join(f"{document.path}#{document.index}" for document, _ in found[:NAMED])
        return names + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")

    def _record(self, bad: BadStep, found: list[tuple[DocumentOrigin, NDArray[np.int64]]]) -> dict[str, Any]:
        documents = [
            {
                "path": document.path,
                "start": document.start,
                "index": document.index,
                "hash": f"{document.hash:016x}",
                "excerpt": self._tokenizer.decode(tokens.tolist())[:EXCERPT_CHARS],
            }
            for document, tokens in found
        ]
        what = {"step": bad.step, "time": time.time(), "reason": bad.reason, "action": bad.action}
        numbers = {"loss": bad.loss, "grad_norm": bad.grad_norm, "zscore": bad.zscore}
        return what | json_safe(numbers) | {"first_sample": bad.first_sample, "documents": documents}

    def _write(self, record: dict[str, Any]) -> None:
        assert self._path is not None
        odd: list[str] = []
        earlier = read_records(self._path, on_invalid=odd.append) if self._path.exists() else []
        keep_broken(self._path, odd)
        kept = [r for r in earlier if r.get("first_sample") != record["first_sample"]]
        lines = (json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in [*kept, record])
        replace_file(self._path, "".join(lines), flush=True)
