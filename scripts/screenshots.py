"""The pictures of docs/, taken of a run's page by headless Chromium (Debian's package `chromium`).

    python scripts/screenshots.py outputs/sample-python

Writes docs/images/report.png, report-dark.png and report-phone.png; look at them before they are committed. Exit code 0: taken;
2: a mistake.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from pretrain.runtime.console import complain
from pretrain.runtime.errors import UserError

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
DESKTOP, PHONE = (1180, 2360), (375, 1560)  # px, of the page that is shown
NARROWEST = 500  # px of a window; what is narrower is shown in a frame
COLOURS = 256  # of a picture: plenty for a page, and a third of the bytes


def browse(page: Path, *options: str, dark: bool = False) -> subprocess.CompletedProcess[str]:
    """Open a file in headless Chromium; what it says, its console too, is in stderr.

    Raises ``UserError`` where there is no Chromium.
    """
    program = shutil.which("chromium")
    if program is None:
        raise UserError("chromium: not found; it is Debian's package of that name")
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
        ]
        command += [f"--user-data-dir={profile}", "--allow-file-access-from-files", "--disable-extensions"]
        command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--disable-dev-shm-usage"]
        return subprocess.run(
            [*command, *options, page.resolve().as_uri()], capture_output=True, text=True, check=False
        )


def shoot(page: Path, picture: Path, size: tuple[int, int], *, dark: bool = False) -> None:
    """Write what a window of ``size`` shows of ``page``, from its top."""
    from PIL import Image

    width, height = size
    with tempfile.TemporaryDirectory() as scratch:
        frame, shot = Path(scratch, "frame.html"), Path(scratch, "shot.png")
        source = page.resolve().as_uri()
        frame.write_text(
            f'<body style="margin:0"><iframe src="{source}" style="border:0;width:{width}px;height:{height}px"></iframe>'
        )
        window = f"--window-size={max(width, NARROWEST)},{height}"
        done = browse(frame, window, f"--screenshot={shot}", dark=dark)
        if not shot.exists():
            raise UserError(f"{page}: no picture came: {done.stderr.strip()[-300:]}")
        image = Image.open(shot).convert("RGB").crop((0, 0, width, height))
    picture.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(COLOURS, kmeans=2, dither=Image.Dither.NONE).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder with a report.html")
    page: Path = parser.parse_args().run / "report.html"
    try:
        if not page.is_file():
            raise UserError(f"{page}: not there; python -m pretrain.tools.report writes it")
        shoot(page, IMAGES / "report.png", DESKTOP)
        shoot(page, IMAGES / "report-dark.png", DESKTOP, dark=True)
        shoot(page, IMAGES / "report-phone.png", PHONE)
    except UserError as error:
        complain(f"error: {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
