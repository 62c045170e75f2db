"""Write a page about a run, or a page that compares several, from the files in their folders. A run may still be in progress.

    python -m pretrain.tools.report outputs/books
    python -m pretrain.tools.report outputs/books outputs/books-2 --output books.html
    python -m pretrain.tools.report multirun/lr                       # a sweep: the ranked page of its jobs

Without --output the page of one run is its report.html, that of a sweep its sweep.html, and that of several runs report.html
in the current folder.

Exit code 0: written; 2: a mistake.
"""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.runtime.console import complain
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import replace_file
from pretrain.tools.arguments import tool_parser


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
    return write(output or usual, text)


def write_sweep(folder: Path, output: Path | None) -> Path:
    """Write the page of a sweep in its present state; sweep.json is not changed. Raises ``UserError``."""
    from pretrain.sweep.job import folder_lock
    from pretrain.sweep.page import page
    from pretrain.sweep.table import read

    if output is not None:
        return write(output, page(folder, read(folder)))
    try:
        with folder_lock(folder):  # the sweep may be running: an older page must not replace a newer one
            return write(folder / "sweep.html", page(folder, read(folder)))
    except OSError as error:
        raise UserError(f"{folder / 'sweep.html'}: can't be written: {error.strerror}") from None


def write(path: Path, text: str) -> Path:
    """Write a page and return its path. Raises ``UserError`` if that is not possible."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --output names the page's file")
    try:
        replace_file(path, text)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    return path


def main() -> None:
    parser = tool_parser("report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder (output_dir), or one sweep folder"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page to write")
    asked = parser.parse_args()
    try:
        print(write_report(asked.runs, asked.output), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except UserError as error:
        complain(f"error: {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
