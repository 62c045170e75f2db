"""A picture of what the console shows of a run, from the run's own records.

    python scripts/picture_console.py RUN [--out docs/images/console.png] [--width 100]

The records of RUN/metrics.jsonl go through the console sink once more, into a terminal that only exists in memory; rich
draws it as SVG, and a headless Chromium (Debian's ``chromium``) takes the picture.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from screenshots import shoot

from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import RunStarted
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.telemetry.sinks.terminal import Terminal

FONT = "'DejaVu Sans Mono', monospace"  # it has the blocks of the curve; nothing is fetched from a network


class Screen(StringIO):
    def isatty(self) -> bool:
        return True


class Still:
    """In the place of rich's live display: of all its frames only the last one is drawn."""

    def __init__(self, console: Console, frame: Any) -> None:
        self.console, self.frame = console, frame

    def refresh(self) -> None:
        pass

    def stop(self) -> None:
        self.console.print(self.frame())


class Recorded(Terminal):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.screen = Console(
            file=Screen(), record=True, width=width, force_terminal=True, color_system="truecolor", highlight=False
        )

    def console(self) -> Console:
        return self.screen

    def _start_live(self, console: Console) -> Any:
        return Still(console, self._status)


def picture(run: Path, *, width: int) -> str:
    """The whole run as SVG."""
    terminal = Recorded(width)
    for record in read_records(run / "metrics.jsonl"):
        if record["event"] == "run_started":
            start = RunStarted(record["step"], record["total_steps"], resumed=record["resumed"], facts=record)
            terminal.open(run, start)
        terminal.write(record)
    terminal.screen.print()
    svg = terminal.screen.export_svg(title="python -m pretrain")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", FONT).replace("font-family: Fira Code", f"font-family: {FONT}")


def photograph(svg: str, out: Path) -> None:
    """PNG of ``svg`` in its own size."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    width, height = (round(float(n)) for n in size.groups())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "console.html"
        page.write_text(f'<body style="margin:0">{svg}</body>', encoding="utf-8")
        shoot(page, out, (width, height))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/console.png"))
    parser.add_argument("--width", type=int, default=100, help="columns")
    given = parser.parse_args()
    if not (given.run / "metrics.jsonl").exists():
        parser.error(f"{given.run} is no run: it has no metrics.jsonl")
    try:
        photograph(picture(given.run, width=given.width), given.out.absolute())
    except UserError as error:
        parser.error(str(error))
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
