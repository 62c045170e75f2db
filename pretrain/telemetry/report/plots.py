"""The charts of one run, and those that compare several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pretrain.telemetry.history import PARTS, History, mean
from pretrain.telemetry.numbers import compact, share
from pretrain.telemetry.record import Record
from pretrain.telemetry.report.charts import (
    Band,
    Format,
    Line,
    Point,
    area_chart,
    heat_chart,
    line_chart,
    scatter_chart,
)
from pretrain.telemetry.report.folder import Run
from pretrain.telemetry.report.style import NUM_COLOURS, Markup, join

NATS = "nats per token"
MAX_METRICS = 12  # charts of metrics of evaluation tasks
TRAINING = 0  # colour of training; the domains have the next colours


def percent(value: float) -> str:
    """Format a fraction as a percentage for an axis."""
    return share(value).replace(" ", "")


def domain_label(name: str, role: str) -> str:
    """Return the label of a domain, such as ``law (new)``."""
    return f"{name} ({role})"


# One run ----------------------------------------------------------------------------------------------------------------


def loss_chart(history: History) -> Markup:
    """Return the chart of the training loss and of the loss of every domain."""
    train = history.train
    key = "loss_mean" if train.has("loss_mean") else "loss"
    band = (train.low("loss"), train.high("loss")) if train.width > 1 else ((), ())
    lines = [Line("training", train.steps, train.mean(key), TRAINING, low=band[0], high=band[1])]
    lines += _domain_lines(history, "loss")
    return line_chart("Loss", lines, unit=NATS, large=True, bands=phase_bands(history))


def change_chart(history: History) -> Markup:
    """Return the chart of the change of the loss since step 0 of every domain."""
    if all(domain.once for domain in history.domains.values()):
        return Markup("")
    lines = _domain_lines(history, "delta_loss")
    unit = f"{NATS} since step 0, lower is better"
    return line_chart("Gain and forgetting", lines, unit=unit, zero=True, large=True, bands=phase_bands(history))


def drift_charts(history: History) -> Markup:
    """Return the charts of KL(base ‖ now) of every domain and of the gain by context, as far as they were measured."""
    if all(domain.once for domain in history.domains.values()):
        return Markup("")
    kl = line_chart(
        "KL to the base model",
        _domain_lines(history, "kl_to_base"),
        unit=f"{NATS}, 0: the same predictions",
        from_zero=True,
        large=True,
        bands=phase_bands(history),
    )
    first = next(iter(history.domains.values()))
    gain = Line("gain by context", *first.curve("in_context_gain"), TRAINING)
    unit = f"{NATS} gained on a repeated random span, higher is better"
    learning = line_chart("In-context learning", [gain], unit=unit, zero=True, large=True, bands=phase_bands(history))
    return join([kl, learning])


def _domain_lines(history: History, key: str) -> list[Line]:
    return [
        Line(domain_label(name, d.role), *d.curve(key), TRAINING + i, dashed=d.role == "base")
        for i, (name, d) in enumerate(history.domains.items(), start=1)
    ]


def training_charts(history: History) -> Markup:
    """Return the charts of the learning rate, the gradient norm, the loss scale and the skipped steps."""
    lr = _single(history, "Learning rate", "lr", from_zero=True)
    norm = _single(history, "Gradient norm", "grad_norm", unit="before clipping", from_zero=True)
    scale = _single(history, "Loss scale", "loss_scale", logarithmic=True)
    skipped = Markup("")
    if history.last_train.get("skipped_steps"):
        skipped = _single(history, "Steps without an update", "skipped_steps", unit="so far", from_zero=True)
    return join([lr, norm, scale, skipped])


def speed_charts(history: History) -> Markup:
    """Return the charts of throughput, time by part, MFU and memory."""
    speed = _single(history, "Throughput", "tokens_per_second", unit="tokens per second", from_zero=True)
    mfu = _single(history, "MFU", "mfu", unit="of the device's peak", from_zero=True, form=percent)
    return join([speed, time_chart(history), mfu, memory_chart(history)])


def metric_charts(history: History) -> Markup:
    """Return one chart for each metric of an evaluation task that was measured at least twice."""
    charts = []
    for key, measurement in list(history.measured.items())[:MAX_METRICS]:
        curve, last = measurement.values, measurement.last
        unit = " · ".join(word for word in (str(last.get("unit") or ""), f"{last.get('better')} is better") if word)
        if len(curve.steps) > 1:
            line = Line(key, curve.steps, curve.mean("value"), 0)
            charts.append(line_chart(key, [line], unit=unit, bands=phase_bands(history)))
    return join(charts)


def time_chart(history: History) -> Markup:
    """Return the chart of each part's share of the time, by step."""
    curves = history.train
    columns = {name: curves.mean(f"part/{name}") for name in PARTS}
    totals = [sum(v or 0.0 for v in row) for row in zip(*columns.values(), strict=True)]
    kept = [i for i, total in enumerate(totals) if total > 0]
    if len(kept) < 2:
        return Markup("")
    steps = [curves.steps[i] for i in kept]
    lines = [
        Line(part_label(history, name), steps, [(columns[name][i] or 0.0) / totals[i] for i in kept], colour)
        for colour, name in enumerate(PARTS)
        if history.seconds[name] > 0
    ]
    return area_chart("Time by part", lines, unit="share, by step", form=percent, bands=phase_bands(history))


def part_label(history: History, part: str) -> str:
    """Return the label of a part. If the records lack the parts of a step, ``other`` is the time of the steps."""
    return "steps" if part == "other" and not history.seconds["compute"] else part


def memory_chart(history: History) -> Markup:
    """Return the chart of the memory of the GPU and of the host."""
    names = {"memory_gib": "peak", "memory_reserved_gib": "reserved", "host_memory_gib": "host"}
    train = history.train
    lines = [
        Line(name, train.steps, train.mean(key), colour)
        for colour, (key, name) in enumerate(names.items())
        if train.has(key)
    ]
    return line_chart("Memory", lines, unit="GiB", from_zero=True, bands=phase_bands(history))


def layer_charts(history: History) -> Markup:
    """Return one heat map per norm, by layer and step."""
    titles = {"update_ratio": "Update / weight", "grad_norm": "Gradient norm", "weight_norm": "Weight norm"}
    layers = history.layers
    steps = next(iter(layers.values())).steps if layers else []
    same = {name: curves for name, curves in layers.items() if curves.steps == steps}
    names = [layer_label(name) for name in same]
    charts = (
        heat_chart(title, names, steps, [curves.mean(key) for curves in same.values()], unit="by layer")
        for key, title in titles.items()
    )
    return join(charts)


def layer_label(name: str) -> str:
    """Shorten the name of a layer: model.layers.3 becomes layers.3, model.embed_tokens becomes embed_tokens."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _single(
    history: History,
    title: str,
    key: str,
    *,
    unit: str = "",
    from_zero: bool = False,
    logarithmic: bool = False,
    form: Format = compact,
) -> Markup:
    line = Line(key.replace("_", " "), history.train.steps, history.train.mean(key))
    return line_chart(
        title,
        [line],
        unit=unit,
        from_zero=from_zero,
        logarithmic=logarithmic,
        form=form,
        bands=phase_bands(history),
    )


def phase_bands(history: History) -> list[Band]:
    """Return the phases of the mixture as bands of the step axis; none where the mixture does not change."""
    phases = phases_of(history)
    if len(phases) < 2:
        return []
    ends = [start for start, _ in phases[1:]] + [float(history.start.get("total_steps") or math.inf)]
    return [
        Band(f"from step {start:,}: {shares_text(shares)}", start, end)
        for (start, shares), end in zip(phases, ends, strict=True)
    ]


def phases_of(history: History) -> list[tuple[int, dict[str, float]]]:
    """Return the first step of each phase of the mixture, and the shares of its parts; none for a single dataset.

    Where a start has another mixture than the one before it, its phases count from its first step on. A single dataset before or
    after a mixture is a phase without shares.
    """
    found: list[tuple[int, dict[str, float]]] = []
    for start in (record for record in history.run_events if record["event"] == "run_started"):
        own = [(phase["step"], phase["shares"]) for phase in start.get("mixture") or [{"step": 0, "shares": {}}]]
        found = [phase for phase in found if phase[0] < start["step"]]
        in_force = [shares for step, shares in own if step <= start["step"]][-1:]
        own = [*((start["step"], shares) for shares in in_force), *(phase for phase in own if phase[0] > start["step"])]
        found += own[1:] if found and own[0][1] == found[-1][1] else own
    return found if any(shares for _, shares in found) else []


def shares_text(shares: dict[str, float]) -> str:
    """Format shares, such as ``es 75 %, code 25 %``."""
    return ", ".join(f"{name} {share(value)}" for name, value in shares.items() if value) or "one dataset"


# Several runs -----------------------------------------------------------------------------------------------------------


def side_by_side(runs: Sequence[Run], names: Sequence[str]) -> tuple[Markup, Markup]:
    """Return the charts of what the runs learned, and the charts of how they ran. Each run is one line in every chart and has
    the same colour in all of them."""
    domains: dict[str, str] = {}
    for run in runs:
        domains |= {name: d.role for name, d in run.history.domains.items()}
    learned = [_curves("Training loss", runs, names, "loss", unit=NATS, large=True), trade_chart(runs, names)]
    for domain, role in domains.items():
        lines = [
            _line(name, *run.history.domains[domain].curve("delta_loss"), i)
            for i, (name, run) in enumerate(zip(names, runs, strict=True))
            if domain in run.history.domains
        ]
        learned.append(
            line_chart(
                f"Change on {domain_label(domain, role)}", lines, unit=f"{NATS} since step 0", zero=True, large=True
            )
        )
    went = [
        _curves("Learning rate", runs, names, "lr", from_zero=True),
        _curves("Gradient norm", runs, names, "grad_norm", from_zero=True),
        _curves("Throughput", runs, names, "tokens_per_second", unit="tokens per second", from_zero=True),
        _curves("MFU", runs, names, "mfu", from_zero=True, form=percent),
        _curves("Memory", runs, names, "memory_gib", unit="GiB, peak", from_zero=True),
    ]
    return join(learned), join(went)


def trade_chart(runs: Sequence[Run], names: Sequence[str]) -> Markup:
    """Return the chart of gain on the new domains against forgetting of the base domains, with one point per run."""
    points = []
    for i, (name, run) in enumerate(zip(names, runs, strict=True)):
        metrics = run.history.metrics()
        gain, lost = metrics["new_delta"], metrics["forgetting"]
        if gain is not None and lost is not None:
            points.append(Point(name, gain, lost, i % NUM_COLOURS, strong=len(runs) <= 8))
    return scatter_chart(
        "Gain against forgetting",
        points,
        x_label="change of new domains",
        unit="change of base domains",
        zero=True,
        large=True,
    )


def merge_chart(history: History) -> Markup:
    """Return the chart of gain against forgetting of the points between the base model and the result, or each checkpoint."""
    points: list[Point] = []
    paths: dict[int | None, list[tuple[float, float]]] = {}
    for (checkpoint, alpha), scores in merge_points(history):
        new, base = (_mean_change(scores, role) for role in ("new", "base"))
        if new is None or base is None:
            continue
        chosen = any(s.get("chosen") for s in scores.values())
        strong = checkpoint is None or chosen
        points.append(
            Point(merge_label(checkpoint, alpha), new, base, 1 if chosen else 0 if strong else 2, strong=strong)
        )
        paths.setdefault(checkpoint, [] if checkpoint is None else [(0.0, 0.0)]).append((new, base))
    return scatter_chart(
        "Between the base model and the result",
        points,
        x_label="change of new domains",
        unit="change of base domains, nats per token",
        paths=[path for path in paths.values() if len(path) > 1],
        zero=True,
        large=True,
    )


def merge_label(checkpoint: int | None, alpha: float) -> str:
    """Return the label of a point between the base model and the result or a checkpoint."""
    return f"{alpha:g}" if checkpoint is None else f"{alpha:g} of step {checkpoint:,}"


def merge_points(history: History) -> list[tuple[tuple[int | None, float], dict[str, Record]]]:
    """Return the points between the base model and the result in ascending order, those of earlier checkpoints first, each with
    its scores by domain."""
    return sorted(history.merge.items(), key=lambda item: (math.inf if item[0][0] is None else item[0][0], item[0][1]))


def _mean_change(scores: dict[str, Record], role: str) -> float | None:
    return mean(s.get("delta_loss") for s in scores.values() if s.get("role") == role)


def _curves(
    title: str,
    runs: Sequence[Run],
    names: Sequence[str],
    key: str,
    *,
    unit: str = "",
    from_zero: bool = False,
    form: Format = compact,
    large: bool = False,
) -> Markup:
    curves = [run.history.train for run in runs]
    lines = [_line(name, c.steps, c.mean(key), i) for i, (name, c) in enumerate(zip(names, curves, strict=True))]
    return line_chart(title, lines, unit=unit, from_zero=from_zero, form=form, large=large)


def _line(name: str, steps: list[int], values: list[float | None], number: int) -> Line:
    return Line(name, steps, values, number % NUM_COLOURS, dashed=number >= NUM_COLOURS)
