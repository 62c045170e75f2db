"""The charts of the loss by position: whether a model uses the context that it has."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.telemetry.history import History
from pretrain.telemetry.record import Record
from pretrain.telemetry.report.charts import Line, line_chart
from pretrain.telemetry.report.plots import NATS, domain_label
from pretrain.telemetry.report.style import Markup, join

ENOUGH = 32  # tokens of a bucket; a mean over fewer is not shown


def position_charts(history: History) -> Markup:
    """Return one chart for each domain, of the loss by position before the run and now. A domain whose text fills fewer than two
    buckets has none."""
    charts = []
    for name, records in history.positions.items():
        if not records or len(_filled(records[-1])) < 2:
            continue
        first, last = records[0], records[-1]
        lines = [_line(last, 0)]
        if first is not last and first.get("digest") == last.get("digest"):
            lines.insert(0, _line(first, 1, dashed=True))
        title = f"Loss by position, {domain_label(name, str(last.get('role')))}"
        charts.append(line_chart(title, lines, unit=NATS, x_label="position", large=True))
    return join(charts)


def unfilled(history: History) -> Iterator[str]:
    """Yield for each domain the positions whose loss is not shown."""
    for name, records in history.positions.items():
        if not records:
            continue
        last = records[-1]
        missing = sorted(set(range(len(last["tokens"]))) - set(_filled(last)))
        if missing:
            first, end = missing[0] * last["width"], (missing[-1] + 1) * last["width"] - 1
            yield (
                f"Loss by position, {domain_label(name, str(last.get('role')))}: between the positions {first:,} and {end:,} "
                f"are buckets with fewer than {ENOUGH} held-out tokens, because documents end before or the text is short; "
                "their loss is not shown."
            )


def _filled(record: Record) -> list[int]:
    return [i for i, tokens in enumerate(record["tokens"]) if tokens >= ENOUGH]


def _line(record: Record, colour: int, *, dashed: bool = False) -> Line:
    filled = _filled(record)
    middles = [(i + 0.5) * record["width"] for i in filled]
    return Line(f"step {record['step']:,}", middles, [record["loss"][i] for i in filled], colour, dashed=dashed)
