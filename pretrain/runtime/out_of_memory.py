"""Detection of errors that mean that memory of a device or of the host ran out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pretrain.runtime.memory import gib, peak_bytes

Doing = Literal["setup", "step", "evaluation", "run"]
SIGNS = (  # in the message of a RuntimeError; the first two are torch's CPU allocator, on Linux and elsewhere
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class OutOfMemory(RuntimeError):
    """Memory ran out while ``doing`` something. The message states how much was requested and available."""

    def __init__(self, doing: Doing, numbers: str) -> None:
        super().__init__(numbers)
        self.doing = doing


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that memory of the device or of the host ran out."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@contextmanager
def watched(doing: Doing) -> Iterator[None]:
    """Raise ``OutOfMemory`` if memory runs out inside. Of nested blocks the innermost ``doing`` is reported."""
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(doing, numbers(error)) from error


def numbers(error: BaseException) -> str:
    """Return how much memory was requested and available, as far as the allocator's message states it."""
    text = str(error)
    found = []
    if requested := re.search(r"tried to allocate (\d+) bytes", text):
        found.append(f"tried to allocate {gib(int(requested[1]))}")
    elif requested := re.search(r"(?:Tried|Unable) to allocate ([\d.]+ \w+)", text):
        found.append(f"tried to allocate {requested[1]}")
    if device := re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text):
        found.append(f"{device[2]} of {device[1]} free")
    elif "CUDA" not in text and (peak := peak_bytes()) is not None:
        found.append(f"{gib(peak)} in use")
    return ", ".join(found) or text.splitlines()[0][:200] if text else "the host's memory"
