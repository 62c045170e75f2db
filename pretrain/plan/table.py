"""The plan as a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pretrain.plan.plan import KINDS, MOST_ROWS, Plan
from pretrain.runtime.memory import gib

if TYPE_CHECKING:
    from rich.table import Table


SHOWN = 2**19  # bytes: smaller numbers would be 0 MiB


def show(plan: Plan) -> None:
    """Print the plan on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(headline(plan), markup=False, soft_wrap=True)
    console.print(_memory(plan))
    if plan.fits:
        console.print(_fits(plan))
    for name, text in lines(plan):
        console.print(f"{name:<12}{text}", markup=False, soft_wrap=True)


def headline(plan: Plan) -> str:
    """Return model, settings and devices in one line."""
    model, setup = plan.model, plan.setup
    trained = f", {model['trained'] / 1e6:,.1f} M trained" if model["trained"] != model["parameters"] else ""
    return (
        f"{model['name']}: {model['parameters'] / 1e6:,.1f} M parameters{trained} · strategy={setup['strategy']} "
        f"precision={setup['precision']} batch_size={setup['batch_size']} "
        f"gradient_accumulation_steps={setup['gradient_accumulation_steps']} sequence_length={setup['sequence_length']} · "
        f"{setup['devices']} × {plan.device.name}"
    )


def _memory(plan: Plan) -> Table:
    from rich.table import Table

    table = Table("memory of one device", title_justify="left", box=None, pad_edge=False)
    table.add_column("at the peak", justify="right")
    table.add_column("between steps", justify="right")
    for kind, words in KINDS.items():
        at_peak, between = plan.peak.get(kind, 0.0), plan.between_steps.get(kind, 0.0)
        if max(at_peak, between) >= SHOWN:
            table.add_row(words, *(gib(size) if size >= SHOWN else "—" for size in (at_peak, between)))
    if plan.peak_bytes is not None:
        table.add_row("total", gib(plan.peak_bytes), gib(sum(plan.between_steps.values())), style="bold")
    for name, size in plan.host_bytes.items():
        table.add_row(f"host memory of one process: {name}", "", gib(size))
    return table


def _fits(plan: Plan) -> Table:
    from rich.table import Table

    table = Table("largest micro-batch", box=None, pad_edge=False)
    for name in ("memory", "without", "with checkpointing"):
        table.add_column(name, justify="right")
    for fit in plan.fits:
        memory = gib(fit.memory_bytes) if fit.memory_bytes else "unknown"
        table.add_row(fit.device, memory, _rows(fit.plain), _rows(fit.checkpointed))
    return table


def _rows(rows: int | None) -> str:
    if rows is None:
        return "—"
    return "none" if rows == 0 else f"{rows}" if rows < MOST_ROWS else f"≥ {rows}"


def lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield name and text of each line below the tables."""
    speed, device = plan.speed, plan.device
    if plan.peak_bytes is not None:
        room = (
            f"{device.name} has room for {gib(device.usable_bytes)}" if device.usable_bytes else "its memory is unknown"
        )
        answer = {True: "fits", False: "does not fit", None: "unknown"}[plan.fits_device]
        yield "answer", f"{answer}: {gib(plan.peak_bytes)} at the peak ({plan.peak_phase}); {room}"
    for change in plan.changes:
        yield "change", change
    if sent := {name: size for name, size in plan.communicated.items() if size >= 1}:
        yield "network", ", ".join(f"{gib(size)} {name}" for name, size in sent.items()) + " by each process in a step"
    yield "operations", _operations(plan)
    yield "speed", _speed(plan)
    if speed.steps is not None:
        hours = "" if speed.hours is None else f", {speed.hours:,.2f} hours"
        yield "work", f"{speed.steps:,} steps ({speed.steps_source}), {speed.tokens:,} tokens{hours}"
    else:
        yield "work", "the number of steps is unknown: the text is not in the token cache; give max_steps"
    if plan.checkpoint["bytes"]:
        yield "checkpoint", f"{gib(plan.checkpoint['bytes'])} in {plan.checkpoint['files']:,.0f} tensor files"
    if plan.data.get("bytes") is not None:
        yield "token cache", f"{gib(plan.data['bytes'])}, {plan.data['tokens']:,} tokens"
    for note in plan.notes:
        yield "note", note


def _operations(plan: Plan) -> str:
    if plan.speed.flops_per_token is None:
        return f"unknown: {plan.speed.flops_unknown}"
    return f"{plan.speed.flops_per_token / 1e9:,.2f} GFLOP per token, forward and backward"


def _speed(plan: Plan) -> str:
    speed = plan.speed
    if speed.tokens_per_second is None:
        if speed.source is None:
            return "unknown: give plan.mfu, or the output_dir of a run that has measured it"
        reason = speed.flops_unknown or f"the peak FLOP/s of {plan.device.name} in this precision is unknown"
        return f"unknown: {reason}"
    share = f" at an MFU of {speed.mfu:.1%}" if speed.mfu is not None else ""
    where = "assumed by plan.mfu" if speed.source == "plan.mfu" else f"measured in {speed.source}"
    return f"{speed.tokens_per_second:,.0f} tokens/s{share}, {where}"
