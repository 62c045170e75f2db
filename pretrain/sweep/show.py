"""Print the results of a sweep on the terminal."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.sweep.measure import ranking


def show(folder: Path, table: dict[str, Any]) -> None:
    """Print the table of jobs on stdout, the best first, and the reasons of failed jobs."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    rows, metric = table["jobs"], table["metric"]
    ranked = ranking(rows, metric["direction"])
    others = [row for row in rows if row not in ranked]
    shown = Table("job", "status", box=SIMPLE_HEAD)
    shown.add_column(metric["name"], justify="right")
    for row in [*ranked, *others]:
        objective = "" if row["objective"] is None else f"{row['objective']:,.4f}"
        shown.add_row(row["name"], row["status"], objective)
    console = Console(markup=False, highlight=False, emoji=False)
    with suppress(OSError):  # the reader of stdout has closed it
        console.print(shown)
        for row in others:
            if row["error"]:
                console.print(f"{row['name']} failed: {row['error']}", soft_wrap=True)
        console.print(f"sweep    {folder / 'sweep.html'}", soft_wrap=True)
