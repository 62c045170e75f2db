"""Write a page about a run, or a page that compares several, from the files in their folders. A run may still be in progress.

    python -m pretrain.tools.report outputs/books
    python -m pretrain.tools.report outputs/books outputs/books-2 --output books.html
    python -m pretrain.tools.report multirun/lr                       # a sweep: the ranked page of its jobs

Without --output the page of one run is its report.html, that of a sweep its sweep.html, and that of several runs report.html
in the current folder.

Exit code 0: written; 2: a mistake.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.runtime.errors import UserError
from pretrain.tools.arguments import mistakes_in_one_line, tool_parser, write_page


def write_report(folders: list[Path], output: Path | None) -> Path:
    """Read the runs, write the page and return its path. Raises ``UserError`` for a folder without a run."""
    from pretrain.telemetry.report.compare import compare_page, names_of
    from pretrain.telemetry.report.folder import read_run
    from pretrain.telemetry.report.page import run_page

    folders = list(dict.fromkeys(folders))
    if len(folders) == 1 and (folders[0] / "sweep.json").is_file():
        return write_sweep(folders[0], output)
    runs = [read_run(folder) for folder in folders]
    if len(runs) == 1:
        text, usual = run_page(runs[0]), folders[0] / "report.html"
    else:
        text, usual = compare_page(runs, names_of(folders)), Path("report.html")
    return write_page(output or usual, text)


def write_sweep(folder: Path, output: Path | None) -> Path:
    """Write the page of a sweep in its present state; sweep.json is not changed. Raises ``UserError``."""
    from pretrain.sweep.job import folder_lock
    from pretrain.sweep.page import page
    from pretrain.sweep.table import read

    if output is not None:
        return write_page(output, page(folder, read(folder)))
    try:
        with folder_lock(folder):  # the sweep may be running: an older page must not replace a newer one
            return write_page(folder / "sweep.html", page(folder, read(folder)))
    except OSError as error:
        raise UserError(f"{folder / 'sweep.html'}: can't be written: {error.strerror}") from None


def main() -> None:
    parser = tool_parser("report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder (output_dir), or one sweep folder"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page to write")
    asked = parser.parse_args()
    with mistakes_in_one_line():
        print(write_report(asked.runs, asked.output), flush=True)


if __name__ == "__main__":
    main()
