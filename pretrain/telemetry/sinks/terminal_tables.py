"""The progress bar, the numbers and the tables that a run shows on a terminal. The functions are pure; rich is imported where
it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.telemetry.history import History
from pretrain.telemetry.in_context import lost_in_context
from pretrain.telemetry.numbers import duration, is_number, number, significant
from pretrain.telemetry.record import STEP_PARTS, WINDOW_PARTS, Record, change_of

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40  # columns, one log step each
NARROW = 72  # columns
PROMPT_TAIL = 60  # characters of a prompt that are shown: its end, where the continuation starts
NEEDED_SPARK = 8  # columns that are reserved for the curve before optional numbers are added
LABELS = {"data": "waiting for data", "compute": "forward+backward", "checkpoint": "checkpoints"}
COLOURS = {"training": "cyan", "compute": "cyan", "optimizer": "magenta", "communication": "blue", "data": "yellow"}
COLOURS |= {"evaluation": "green", "checkpoint": "bright_black", "other": "white"}


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw the last ``width`` values, scaled between their minimum and maximum; × marks a value that is not a number."""
    shown = list(values)[-width:] if width > 0 else []
    known = [v for v in shown if v is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    return "".join("×" if v is None else BLOCKS[round((v - low) / span * 7) if span > 0 else 0] for v in shown)


def status(record: Record, history: History, *, total: int, width: int, level: int, curve: bool) -> Table:
    """Return the two status lines of a running run: the bar, and the numbers with the curve of the loss.

    ``curve`` is whether the terminal can print the characters of the curve. ``record`` is the last train record; before the
    first one it has only ``step``."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    step = record["step"]
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    style = "green" if step >= total else "cyan"
    bar.add_row(
        f"[bold]{step:>{len(str(total))}}[/]/{total}",
        ProgressBar(total=total, completed=step, complete_style=style, finished_style=style),
        progress_text(record, total),
    )
    lines = Table.grid(expand=False)
    lines.width = min(width, 100)
    lines.add_row(bar)
    lines.add_row(numbers_line(record, history, width=lines.width, level=level, curve=curve) if "lr" in record else "")
    return lines


def progress_text(record: Record, total: int) -> str:
    """Return the progress in percent and the estimated remaining time."""
    if record["step"] >= total:
        return "done"
    left = seconds_left(record, total)
    return f"{record['step'] / total:4.0%}" + (f"  {duration(left)} left" if left is not None else "")


def numbers_line(r: Record, history: History, *, width: int, level: int, curve: bool) -> Text:
    """Return the loss and as many other numbers as fit, the most important first."""
    from rich.text import Text

    loss = loss_text(r.get("loss"))
    more = [f"{r['tokens_per_second']:,.0f} tokens/s"] if r.get("tokens_per_second") is not None else []
    more += [f"lr {r['lr']:.2e}"]
    more += [f"MFU {r['mfu']:.1%}"] if r.get("mfu") is not None else []
    more += [f"{r['memory_gib']:.2f} GiB"] if r.get("memory_gib") is not None else []
    more += [f"grad norm {number(r.get('grad_norm'))}"] if level >= 4 else []
    room = width - len(f"loss {loss}") - (NEEDED_SPARK + 2 if curve else 0)
    shown = []
    for word in more:
        if room < len(word) + 3:
            break
        shown.append(word)
        room -= len(word) + 3
    line = Text.assemble(("loss ", "bright_black"), (loss, "bold"), no_wrap=True, overflow="ellipsis")
    if curve:
        values = [value for _, value in history.losses]
        line.append(f"  {sparkline(values, min(SPARK_WIDTH, NEEDED_SPARK + room))}", "cyan")
    for word in shown:
        line.append(" · ", "bright_black").append(word)
    return line


def changes(history: History, *, step: int, width: int) -> Table:
    """Return the table of each domain's change in the run, which is at ``step``; narrow terminals get short labels."""
    narrow = width < NARROW
    titles = ("perplexity", "nats") if narrow else ("perplexity before", "after", "change in loss (nats)")
    table = _table("domain", *titles)
    for name, domain in history.domains.items():
        values = [number(domain.first["perplexity"]), _scored_last(domain.last, step)]
        values = [" → ".join(values)] if narrow else values
        table.add_row(f"{name} ({domain.role})", *values, change(domain.last, word=not narrow))
    return table


def _scored_last(record: Record, step: int) -> str:
    """Return the perplexity of a domain's last evaluation, with its step if that is not the run's current ``step``."""
    if record["step"] == 0 < step:
        return "—"
    return number(record["perplexity"]) + ("" if record["step"] == step else f" (step {record['step']})")


def reasons(history: History) -> list[str]:
    """Return one line for each domain whose change is unknown, with the reason, and one if in-context learning is lost."""
    lost = lost_in_context(history)
    unknown = [
        f"{name}: change since step 0 unknown: {domain.last['delta_reason']}"
        for name, domain in history.domains.items()
        if domain.last.get("delta_reason")
    ]
    return unknown if lost is None else [*unknown, lost]


def scores(history: History) -> Table:
    """Return the table of scores of `task=evaluation`."""
    table = _table("domain", "loss (nats)", "perplexity", "bits per byte", "tokens")
    for name, domain in history.domains.items():
        r = domain.last
        loss, bits = ("—" if r[key] is None else f"{r[key]:.4f}" for key in ("loss", "bits_per_byte"))
        table.add_row(f"{name} ({domain.role})", loss, number(r["perplexity"]), bits, f"{r['tokens']:,}")
    return table


def parts(history: History) -> Table | None:
    """Return the table of what the run has read of each part of a mixture; ``None`` for a single part."""
    counts = history.data.get("parts") or {}
    if len(counts) < 2:
        return None
    table = _table("part", "tokens read", "share", "by the weights", "epochs")
    for name, part in counts.items():
        table.add_row(
            name, f"{part['tokens']:,}", f"{part['share']:.1%}", f"{part['wanted']:.1%}", f"{part['epochs']:.2f}"
        )
    return table


def measured(record: Record) -> str:
    """Format the value of a metric with its standard error and unit; null stands for a value that is not finite."""
    value = "nan" if record["value"] is None else significant(record["value"])
    error = "" if record.get("stderr") is None else f" ± {significant(record['stderr'])}"
    return f"{value}{error} {record.get('unit') or ''}".rstrip()


def measurements(history: History) -> Table:
    """Return the table of the metrics of evaluation tasks: first and last value, or the value where each was measured once."""
    once = all(measurement.first is measurement.last for measurement in history.measured.values())
    table = _table("metric", *(("value",) if once else ("first", "last")), "better")
    for key, measurement in history.measured.items():
        first, last = measurement.first, measurement.last
        before = [] if once else ["—" if first is last else measured(first)]
        table.add_row(key, *before, measured(last), str(last.get("better") or ""))
    return table


def samples(history: History, step: int) -> list[Text]:
    """Return one sample per domain and each of the user's prompts, before and after the run, which is at ``step``. The caller
    truncates the lines to the width of the terminal."""
    from rich.text import Text

    shown: dict[tuple[str, str], list[Record]] = {}
    for known in filter(None, history.samples.values()):
        first, last = known[0], known[-1]
        pair = shown.setdefault((first["domain"], first["prompt"] if first["role"] == "user" else ""), [first, last])
        if last["step"] > pair[1]["step"]:  # the domain's prompt has changed
            pair[1] = last
    lines = []
    for before, after in shown.values():
        prompt = one_line(after["prompt"])
        tail = prompt if len(prompt) <= PROMPT_TAIL else f"…{prompt[-PROMPT_TAIL:]}"
        lines.append(Text.assemble((f"{after['domain']} ({after['role']})", "bold"), f"  {tail}"))
        rows = [("before", before, ""), ("after", after, "bold")]
        if before["step"] == after["step"] or before["prompt"] != after["prompt"]:
            rows = [("before" if after["step"] == 0 < step else "model", after, "bold")]
        for name, record, style in rows:
            lines.append(Text.assemble((f"  {name:<7}", "bright_black"), (one_line(record["text"]), style)))
        lines.append(Text(""))
    return lines


def time_line(history: History) -> Text:
    """Return the total time and the share of each part in its colour; the result is empty if no times were recorded."""
    from rich.text import Text

    names = ("training", *STEP_PARTS, "other", *WINDOW_PARTS)
    steps = (
        "other" if history.seconds["compute"] else "training"
    )  # records without the parts of a step have its time only
    known = history.seconds | {"other": 0.0, steps: history.seconds["other"]}
    spent = {name: known[name] for name in names if known.get(name, 0.0) > 0}
    total = sum(spent.values())
    line = Text(duration(total) if total else "")
    for name, seconds in spent.items():
        if seconds >= 0.005 * total:
            line.append("  ■ ", COLOURS[name]).append(f"{LABELS.get(name, name)} {seconds / total:.0%}")
    return line


def change(record: Record, *, unit: str = "", word: bool = True) -> Text:
    """Return the change of a domain's loss since step 0 in nats per token, and whether it is better or worse."""
    from rich.text import Text

    delta = change_of(record)
    if delta is None:
        return Text("not scored since step 0" if word and record["step"] == 0 else "—")
    if abs(delta) < 0.00005:
        return Text(f"= 0.0000{unit}")
    arrow, verdict, style = ("↓", "better", "green") if delta < 0 else ("↑", "worse", "red")
    return Text(f"{arrow} {abs(delta):.4f}{unit}{f' {verdict}' if word else ''}", style)


def seconds_left(record: Record, total: int) -> float | None:
    """Return the remaining seconds that the record estimates.

    The first record has no estimate, because its step includes compilation. For a record of an earlier version the estimate
    is computed from the time of its steps."""
    if "eta_seconds" in record:
        eta = record["eta_seconds"]
        return None if eta is None else float(eta)
    pace = record.get("step_seconds")
    return None if pace is None else float(pace) * (total - record["step"])


def one_line(text: str) -> str:
    """Return ``text`` as one line that is safe to print: text of a model may contain line breaks and control characters."""
    broken = " ⏎ ".join(line.strip() for line in text.splitlines() if line.strip())
    return "".join(c if c.isprintable() else "·" for c in broken)


def loss_text(value: float | None) -> str:
    """Format a loss; null in a record stands for NaN or infinity."""
    return "nan" if value is None else f"{value:.4f}"


def _table(*titles: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        table.add_column(
            title,
            justify="left" if title in ("domain", "metric", "part") else "right",
            no_wrap=title in ("perplexity", "nats"),
        )
    return table


def planned_memory(start: Record) -> str | None:
    """Return what the run's plan has predicted, from its ``run_started`` record; ``None`` without a plan. On a CPU it is the
    memory of the tensors, which the resident memory of the process exceeds."""
    planned, room = start.get("planned_memory_gib"), start.get("device_memory_gib")
    if not is_number(planned):
        return None
    return f"{planned:.1f} GiB of {room:.0f}" if is_number(room) else f"{planned:.2f} GiB of tensors"
