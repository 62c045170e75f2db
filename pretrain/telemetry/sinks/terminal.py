"""The console output of a run: a live bar on a terminal, one line per log step elsewhere, and a summary at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.history import History
from pretrain.telemetry.numbers import number
from pretrain.telemetry.record import Record, metric_key
from pretrain.telemetry.sinks import terminal_tables as tables
from pretrain.telemetry.sinks.base import Sink

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live


class Terminal(Sink):
    """A sink that writes to stdout. It writes no escape codes if stdout is not a terminal, and no colours if NO_COLOR is set.
    The table at the end compares each domain before and after this run.

    Attributes:
        level: 1: start and end · 2: also evaluations and checkpoints · 3: also steps · 4: also gradient norm and
            memory.
    """

    def __init__(self, level: Literal[1, 2, 3, 4] = 3) -> None:
        self._level = level
        self._console: Console | None = None
        self._live: Live | None = None
        self._history = History()
        self._last: Record = {"step": 0}
        self._total = 0
        self._over = False
        self._folder = Path()

    def open(self, run: Path, start: RunStarted) -> None:
        self._console = self.console()
        self._total, self._folder, self._over = start.total_steps, run, False
        self._history = start.history or History()
        self._last = {"step": start.step}
        # a terminal without cursor movement gets one line per log step, like a file
        if self._level >= 3 and self._total and self._console.is_interactive and self._console.file.isatty():
            self._live = self._start_live(self._console)

    def console(self) -> Console:
        """Return the console to write to."""
        from rich.console import Console

        return Console(highlight=False)

    def _start_live(self, console: Console) -> Live:
        """Start a live display that is redrawn at log steps only, so that no thread runs next to the training."""
        from rich.live import Live

        live = Live(console=console, auto_refresh=False, get_renderable=self._status, vertical_overflow="visible")
        live.start()
        return live

    def write(self, record: Record) -> None:
        getattr(self, f"_{record['event']}", lambda record: None)(record)

    def close(self) -> None:
        self._over = True
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _status(self) -> RenderableType:
        """Return the two status lines. The empty line below them is reserved for the progress bar of an evaluation, which is
        drawn by `runtime.console`."""
        from rich.console import Group

        assert self._console is not None
        width, curve = self._console.width, self._console.encoding.lower().startswith("utf")
        lines = tables.status(self._last, self._history, total=self._total, width=width, level=self._level, curve=curve)
        return lines if self._over else Group(lines, "")

    def _print(self, *parts: Any) -> None:
        """Print one line without wrapping, so that paths can be copied."""
        from rich.text import Text

        assert self._console is not None
        self._console.print(Text.assemble(*parts), soft_wrap=True)

    def _print_labelled(self, name: str, *parts: Any) -> None:
        self._print((f"{name:<9}", "bright_black"), *parts)

    def _run_started(self, r: Record) -> None:
        parameters = f"{r['parameters'] / 1e6:.1f} M parameters" if "parameters" in r else ""
        if (trained := r.get("trained_parameters", r.get("parameters"))) != r.get("parameters"):
            parameters += f", {trained:,} of them trained"
        work = f"trains {r['total_steps']} steps" if r["total_steps"] else "is scored"
        if r["resumed"]:
            work = f"continues at step {r['step']} of {r['total_steps']}"
        name = (str(r.get("model", "model")), "bold")
        self._print(name, f" ({parameters}) {work} on {r.get('device')}; {self._folder}")
        if (planned := tables.planned_memory(r)) is not None:
            self._print_labelled("memory", f"expects {planned}")

    def _train(self, r: Record) -> None:
        self._last = r
        if self._live is not None:
            self._live.refresh()
        elif self._level >= 3:
            numbers = f"loss {tables.loss_text(r['loss'])}  lr {r['lr']:.2e}"
            if r["tokens_per_second"] is not None:
                numbers += f"  {r['tokens_per_second']:,.0f} tokens/s"
            if r.get("mfu") is not None:
                numbers += f"  MFU {r['mfu']:.1%}"
            if self._level >= 4:
                numbers += f"  grad norm {number(r['grad_norm'])}  {r['memory_gib']:.2f} GiB"
            self._print(f"step {r['step']:>{len(str(self._total))}}/{self._total}  {numbers}")

    def _evaluation(self, r: Record) -> None:
        if self._level < 2:
            return
        since: tuple[Any, ...] = ()
        if r.get("delta_reason"):
            since = (f"  change since step 0 unknown: {r['delta_reason']}",)
        elif r["step"]:
            change = tables.change(r, unit=" nats")
            since = ("  ", change, " since step 0" if change.plain.startswith(("=", "—")) else " than at step 0")
        domain = (f"{r['domain']} ({r['role']})".ljust(16), "bold")
        perplexity = f"perplexity {number(r['perplexity']):>6}"
        self._print(f"step {r['step']:>{len(str(self._total))}}  ", domain, f"  {perplexity}", *since)

    def _metric(self, r: Record) -> None:
        if self._level >= 2:
            self._print(
                f"step {r['step']:>{len(str(self._total))}}  ", (metric_key(r), "bold"), f"  {tables.measured(r)}"
            )

    def _checkpoint(self, r: Record) -> None:
        if self._live is None and self._level >= 2:
            self._print(f"step {r['step']}  saved {r['path']}")

    def _run_finished(self, r: Record) -> None:
        assert self._console is not None
        self.close()
        if self._history.domains:
            self._console.print(self._domains(r["step"]))
            for reason in tables.reasons(self._history):
                self._print(reason)
        if self._total and (parts := tables.parts(self._history)):
            self._console.print(parts)
        if self._history.measured:
            self._console.print(tables.measurements(self._history))
        for line in tables.samples(self._history, r["step"]):
            self._console.print(line, no_wrap=True, overflow="ellipsis")
        if self._total:
            self._totals(r)

    def _domains(self, step: int) -> RenderableType:
        """Return the table of each domain's change in this run, or of the scores if nothing was trained."""
        assert self._console is not None
        if not self._total:
            return tables.scores(self._history)
        return tables.changes(self._history, step=step, width=self._console.width)

    def _totals(self, r: Record) -> None:
        """Print the status, the speed, and the paths of the results."""
        colour = {"finished": "green", "stopped": "yellow"}.get(r["status"], "red")
        self._print((r["status"], f"bold {colour}"), f" at step {r['step']}/{self._total}: {r['tokens']:,} tokens")
        speed = [f"{r['tokens_per_second']:,.0f} tokens/s"] if r["tokens_per_second"] else []
        speed += [f"MFU {r['mfu']:.1%}"] if r.get("mfu") is not None else []
        speed += [f"goodput {r['goodput']:.0%}"] if r.get("goodput") is not None else []
        if speed:
            self._print_labelled("speed", " · ".join(speed))
        if spent := tables.time_line(self._history):
            self._print_labelled("time", spent)
        if memory := self._history.memory_gib:
            names = {"memory_gib": "GiB peak", "host_memory_gib": "GiB on the host"}
            parts = [f"{gib:.2f} {names[kind]}" for kind, gib in memory.items()]
            if (planned := tables.planned_memory(self._history.start)) is not None:
                parts.append(f"expected {planned}")
            self._print_labelled("memory", " · ".join(parts))
        if r["model"]:
            self._print_labelled("model", r["model"])
        if (self._folder / "report.html").exists():
            self._print_labelled("report", str(self._folder / "report.html"))
        self._print_labelled("records", str(self._folder / "metrics.jsonl"))
