"""What a person sees while a run goes: a live bar on a terminal, a line per log step elsewhere, a table at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain.events import RunStarted

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress
    from rich.table import Table


class Terminal:
    """Writes to stdout. The table compares each domain's perplexity before this run with the one after it.

    ``level``: 1 start and end · 2 and evaluations and checkpoints · 3 and steps · 4 with gradient norm and memory.
    """

    def __init__(self, level: Literal[1, 2, 3, 4] = 3) -> None:
        self._level = level
        self._console: RichConsole | None = None
        self._bar: RichProgress | None = None
        self._before: dict[str, dict[str, Any]] = {}
        self._after: dict[str, dict[str, Any]] = {}
        self._total = 0
        self._folder = Path()

    def open(self, run: Path, start: RunStarted) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        self._total = start.total_steps
        self._folder = run
        if self._console.is_terminal:
            self._bar = _progress(self._console)
            self._bar.start()
            self._task = self._bar.add_task("train", total=start.total_steps, completed=start.step, numbers="")

    def write(self, record: dict[str, Any]) -> None:
        getattr(self, f"_{record['event']}", lambda record: None)(record)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        assert self._console is not None
        self._console.print(line, markup=False)

    def _run_started(self, r: dict[str, Any]) -> None:
        parameters = f"{r['parameters'] / 1e6:.1f} M parameters" if "parameters" in r else ""
        work = f"trains {r['total_steps']} steps" if r["total_steps"] else "is scored"
        if r["resumed"]:
            work = f"continues at step {r['step']} of {r['total_steps']}"
        self._say(f"{r.get('model', 'model')} ({parameters}) {work} on {r.get('device')}; {self._folder}")

    def _train(self, r: dict[str, Any]) -> None:
        loss = "nan" if r["loss"] is None else f"{r['loss']:.4f}"
        numbers = f"loss {loss}  lr {r['lr']:.2e}  {r['tokens_per_second'] or 0:,.0f} tokens/s"
        if self._level >= 4:
            numbers += f"  grad norm {_number(r['grad_norm'])}  {r['memory_gib']:.2f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=r["step"], numbers=numbers)
        elif self._level >= 3:
            self._say(f"step {r['step']:>{len(str(self._total))}}/{self._total}  {numbers}")

    def _evaluation(self, r: dict[str, Any]) -> None:
        before = self._before.setdefault(r["domain"], r if r["step"] == 0 else _baseline(r))
        self._after[r["domain"]] = r
        if self._level < 2:
            return
        change = "" if before is r else f"  ({_change(before, r)} nats since step 0)"
        self._say(f"step {r['step']}  {r['domain']} ({r['role']}): perplexity {_number(r['perplexity'])}{change}")

    def _checkpoint(self, r: dict[str, Any]) -> None:
        if self._bar is None and self._level >= 2:
            self._say(f"step {r['step']}  saved {r['path']}")

    def _run_finished(self, r: dict[str, Any]) -> None:
        assert self._console is not None
        self.close()
        self._console.print(self._changes() if self._total else self._scores())
        if not self._total:
            return
        speed = f", {r['tokens_per_second']:,.0f} tokens/s" if r["tokens_per_second"] else ""
        self._say(f"{r['status']} at step {r['step']}/{self._total}: {r['tokens']:,} tokens{speed}")
        if r["model"]:
            self._say(f"model    {r['model']}")
        if (self._folder / "report.html").exists():
            self._say(f"report   {self._folder / 'report.html'}")
        self._say(f"records  {self._folder / 'metrics.jsonl'}")

    def _changes(self) -> Table:
        """What the run did to each domain."""
        table = _table("domain", "perplexity before", "after", "change in loss (nats)")
        for domain, after in self._after.items():
            before = self._before[domain]
            numbers = (_number(before["perplexity"]), _number(after["perplexity"]), _change(before, after))
            table.add_row(f"{domain} ({after['role']})", *numbers)
        return table

    def _scores(self) -> Table:
        """What `task=evaluation` found."""
        table = _table("domain", "loss (nats)", "perplexity", "bits per byte", "tokens")
        for domain, r in self._after.items():
            bits = "—" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}"
            numbers = (
                "—" if r["loss"] is None else f"{r['loss']:.4f}",
                _number(r["perplexity"]),
                bits,
                f"{r['tokens']:,}",
            )
            table.add_row(f"{domain} ({r['role']})", *numbers)
        return table


def _table(*titles: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        table.add_column(title, justify="left" if title == "domain" else "right")
    return table


def _baseline(record: dict[str, Any]) -> dict[str, Any]:
    """The record of step 0, worked out from a later one (a resumed process has not seen step 0)."""
    if record["loss"] is None or record["delta_loss"] is None:  # no number, or a domain added on resume
        return record | {"step": 0, "loss": None, "perplexity": None}
    loss = record["loss"] - record["delta_loss"]
    return record | {"step": 0, "loss": loss, "perplexity": math.exp(loss)}


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    known = before["loss"] is not None and after["loss"] is not None
    return f"{after['loss'] - before['loss']:+.4f}" if known else "—"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:,.2f}"


def _progress(console: RichConsole) -> RichProgress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=console)
