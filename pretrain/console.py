"""What people see on the terminal: notices on stderr and a progress bar for long work, quiet when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


def notice(message: str) -> None:
    """Say one line on stderr; a closed terminal is no reason to stop a run."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(description: str, *, total: float | None, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Yield ``advance(amount)``. A bar on a terminal; elsewhere nothing is drawn.

    ``total`` is in the same unit as the amounts (``None``: unknown); ``unit`` ``"B"`` shows sizes as bytes.
    """
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
