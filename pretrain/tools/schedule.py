"""Show the learning-rate schedule of a run, by the words of its command line. No data and no model are read.

    python -m pretrain.tools.schedule scheduler=infinite max_steps=2000
    python -m pretrain.tools.schedule scheduler=wsd scheduler.decay=linear lr=3e-4 --output schedule.svg

Without max_steps the picture is of 1,000 steps, and with lr=auto of the multiplier of the peak.

Exit code 0: shown; 2: a mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.config.compose import run_config
from pretrain.config.schema import RunConfig
from pretrain.optim.learning_rate import AUTO
from pretrain.runtime.errors import UserError
from pretrain.telemetry.numbers import compact
from pretrain.tools.arguments import mistakes_in_one_line, tool_parser, write_page

STEPS = 1000  # of a run without max_steps
WIDTH, HEIGHT = 72, 12  # characters of the text picture


def learning_rates(config: RunConfig) -> list[float]:
    """Return the learning rate of every step of the run, or the multiplier of the peak where ``lr`` is auto."""
    from pretrain.run.build import build_schedule

    steps = config.max_steps or STEPS
    peak = 1.0 if config.lr == AUTO else float(config.lr)
    if config.lr == AUTO and (start_lr := config.plain["scheduler"].get("start_lr")):
        raise UserError(f"scheduler.start_lr={start_lr}: this picture needs the peak as a number, lr=…")
    schedule = build_schedule(config, steps)
    return [peak * schedule(step) for step in range(steps)]


def as_text(values: Sequence[float]) -> str:
    """Return a picture of ``values`` by step, with the highest value at the top left and the steps below."""
    columns = min(WIDTH, len(values))
    shown = [values[i * len(values) // columns] for i in range(columns)]
    shown[-1] = values[-1]
    top = max(values)
    rows = []
    for row in range(HEIGHT, 0, -1):
        eighths = [round(value / top * HEIGHT * 8) - 8 * (row - 1) for value in shown]
        label = compact(top) if row == HEIGHT else ""
        rows.append(f"{label:>9} │{''.join(' ▁▂▃▄▅▆▇█'[min(8, max(0, n))] for n in eighths)}".rstrip())
    last = f"step {len(values):,}"
    return "\n".join([*rows, f"{'0':>9} └{'─' * columns}", f"{'':>11}1{last:>{max(columns - 1, len(last) + 1)}}"])


def as_svg(values: Sequence[float], title: str) -> str:
    """Return the same picture as an SVG file."""
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(values) + 1), values)
    axes.set(title=title, xlabel="step", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # the same picture has the same bytes
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def show(words: list[str], output: Path | None) -> None:
    """Print the picture, and write it to ``output``. Raises ``UserError`` for a mistake in the words."""
    config = run_config(words)
    values = learning_rates(config)
    name = config.plain["scheduler"]["_target_"].rpartition(".")[2]
    title = f"{name}: {'share of the peak' if config.lr == AUTO else 'learning rate'}"
    print(title)
    print(as_text(values), flush=True)
    if output is not None:
        print(write_page(output, as_svg(values, title)), flush=True)


def main() -> None:
    parser = tool_parser("schedule", __doc__)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="words of a run's command line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the picture as SVG")
    asked = parser.parse_args()
    with mistakes_in_one_line():
        show(asked.words, asked.output)


if __name__ == "__main__":
    main()
