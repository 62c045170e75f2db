"""What each means against forgetting gains, forgets and costs: a table in docs/results.md and docs/images/means.svg.

    python scripts/make_means_study.py [--spanish FILE] [--folder outputs/means] [--jobs 2] [words of the command line …]

It runs `experiment=means` (conf/experiment/means.yaml) on two shifts of the shipped sample: to Python's standard library (the
default dataset) and to Spanish. Each is a sweep, so that the same command resumes what was stopped. With two idle cores the
runs take about 20 minutes.

The Spanish text is a file of your own (--spanish, anything that dataset=local reads) or the Reina-Valera Bible of 1909,
which is in the public domain. It comes from Debian's package sword-text-sparv, which is downloaded with apt-get and unpacked
without being installed.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs/results.md", ROOT / "docs/images/means.svg"
BEGIN, END = "<!-- means -->\n", "<!-- end of means -->\n"
PACKAGE, BIBLE = "sword-text-sparv", "usr/share/sword/modules/texts/ztext/spaRV1909eb"
NAMES = {  # of the choices of `experiment/means`, and of what the runs of full training yield besides
    "full": "full training",
    "low_lr": "full, a fifth of the lr",
    "replay": "replay 0.1",
    "kl_to_base": "kl_to_base 0.3",
    "lora": "LoRA, rank 16",
    "freeze": "freeze 4 of 6 blocks",
    "expand": "expand by 2 blocks",
    "merge": "merge α*",
    "ema": "EMA 0.95",
}
SHIFTS = {"python": "Python", "spanish": "Spanish"}
INK, SOFT, GRID = "#010101", "#020202", "#030303"  # stand for the page's colours, which are light or dark
STYLE = (
    "<style>svg{--ink:#1f2328;--soft:#59636e;--grid:#d1d9e0}"
    "@media(prefers-color-scheme:dark){svg{--ink:#f0f6fc;--soft:#9198a1;--grid:#3d444d}}</style>"
)
COLOURS = ("#8b949e", "#d29922", "#2da44e", "#8250df", "#0969da", "#bf3989", "#1b7c83", "#e5534b", "#9a6700")


# -- the Spanish text -----------------------------------------------------------------------------------------------------


def spanish(folder: Path) -> Path:
    """Return the Bible as a .jsonl with one chapter a document. It is written into ``folder`` if it is not there yet."""
    file = folder / "spanish.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
            (package,) = folder.glob(f"{PACKAGE}_*.deb")
            subprocess.run(["dpkg-deb", "-x", package, folder / PACKAGE], check=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"error: Debian's package {PACKAGE} can't be read ({error}); give a Spanish text with --spanish"
            ) from None
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in chapters(folder / PACKAGE / BIBLE)]
        file.write_text("\n".join(lines) + "\n")
    return file


def chapters(module: Path) -> Iterator[str]:
    """Yield the text of each chapter of a SWORD module of compressed OSIS. Its index has 12 bytes for each book: the place,
    the compressed size and the size of the book, as little-endian 32-bit numbers."""
    for testament in ("ot", "nt"):
        data = (module / f"{testament}.bzz").read_bytes()
        for place, size, _ in struct.iter_unpack("<III", (module / f"{testament}.bzs").read_bytes()):
            book = zlib.decompress(data[place : place + size]).decode()
            for chapter in re.split(r"<chapter [^>]*sID=[^>]*>", book)[1:]:
                text = re.sub(r"<(title|note)\b.*?</\1>", "", chapter, flags=re.DOTALL)
                yield " ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split())


# -- the runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one run, or a model made from it, has come to. All in nats per token.

    Attributes:
        gain: by which the loss on the new domain has become lower.
        forgetting: by which the loss on the base domain has become higher.
        kl: KL(base ‖ model) on the new domain; ``None``: not measured, as for the moving average.
        in_context: gain by context; ``None``: not measured.
        note: what the table says next to the name.
    """

    gain: float
    forgetting: float
    kl: float | None = None
    in_context: float | None = None
    note: str = ""


@dataclass
class Shift:
    """The results of the sweep of one shift, one of each seed: by means, and the points between base and result by α."""

    results: dict[str, list[Result]]
    curve: dict[float, list[Result]]
    trained: dict[str, str]
    before: Result

    def on_curve(self, gain: float) -> float | None:
        """Return the forgetting of the point of the merge curve that has this gain."""
        points = sorted((average(r, "gain"), average(r, "forgetting")) for r in self.curve.values())
        for (low, start), (high, end) in pairwise(points):
            if low <= gain <= high:
                return start + (end - start) * (gain - low) / (high - low)
        return None


def run_sweep(folder: Path, jobs: int, words: list[str]) -> None:
    command = [sys.executable, "-m", "pretrain", "experiment=means", f"sweep_dir={folder}", *words]
    if jobs > 1:
        command += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code:
        raise SystemExit(code)


def shift_of(folder: Path) -> Shift:
    """Read the finished runs of a sweep."""
    shift = Shift({}, {}, {}, Result(0, 0))
    for job in sorted(folder.glob("*/job.json")):
        facts = json.loads(job.read_text())
        if facts["status"] != "finished":
            continue
        words = dict(word.split("=", 1) for word in facts["overrides"])
        records = [json.loads(line) for line in (job.parent / "metrics.jsonl").read_text().splitlines()]
        name, end = words["experiment/means"], records[-1]["step"]
        scores = [r for r in records if r["event"] == "evaluation"]
        shift.results.setdefault(name, []).append(result([r for r in scores if r["step"] == end]))
        shift.before = result([r for r in scores if r["step"] == 0])
        facts = json.loads((job.parent / "run.json").read_text())
        shift.trained[name] = f"{facts['trained_parameters'] / 1e6:.2f} M"
        if name == "full":
            read_curve(shift, [r for r in records if r["event"] == "merge"])
            start = {r["domain"]: r for r in scores if r["step"] == 0}
            read_average(shift, start, [r for r in records if r["event"] == "metric" and r["step"] == end])
    return shift


def result(scores: list[dict[str, Any]], note: str = "") -> Result:
    new, base = (next(r for r in scores if r["role"] == role) for role in ("new", "base"))
    return Result(-new["delta_loss"], base["delta_loss"], new["kl_to_base"], new["in_context_gain"], note)


def read_curve(shift: Shift, points: list[dict[str, Any]]) -> None:
    by_alpha: dict[float, list[dict[str, Any]]] = {}
    for point in points:
        by_alpha.setdefault(point["alpha"], []).append(point)
    for alpha, scores in by_alpha.items():
        shift.curve.setdefault(alpha, []).append(result(scores))
        if any(score["chosen"] for score in scores):
            shift.results.setdefault("merge", []).append(result(scores, f"{alpha:g}"))


def read_average(shift: Shift, start: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    """Read the losses of the moving average at the end; ``start`` has the evaluations of step 0 by domain."""
    change = {
        start[r["domain"]]["role"]: r["value"] - start[r["domain"]]["loss"]
        for r in metrics
        if r["name"].startswith("ema_")
    }
    shift.results.setdefault("ema", []).append(Result(-change["new"], change["base"]))


def average(results: list[Result], field: str) -> float:
    return mean(getattr(result, field) for result in results)


# -- the page -------------------------------------------------------------------------------------------------------------


def table(shift: Shift) -> str:
    head = (
        "",
        "trained",
        "gain",
        "forgetting",
        "the same gain on the merge curve forgets",
        "KL to base",
        "in-context gain",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines.append(f"| the base model | | 0 | 0 | | 0 | {shift.before.in_context:.2f} |")
    for name in (name for name in NAMES if name in shift.results):
        results = shift.results[name]
        pairs = (" · ".join(f"{getattr(r, field):.3f}" for r in results) for field in ("gain", "forgetting"))
        free = None if name in ("full", "merge") else shift.on_curve(average(results, "gain"))
        measured = (
            "–" if results[0].kl is None else f"{average(results, field):.2f}" for field in ("kl", "in_context")
        )
        note = f" = {' · '.join(r.note for r in results)}" if results[0].note else ""
        trained = shift.trained.get(name, "")
        cells = (NAMES[name] + note, trained, *pairs, "" if free is None else f"{free:.3f}", *measured)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_page(shifts: dict[str, Shift]) -> None:
    parts = [
        f"{SHIFTS[name]} (gain and forgetting with seeds 0 · 1):\n\n{table(shift)}" for name, shift in shifts.items()
    ]
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + "\n".join(parts) + page[page.index(END) :])


def draw(shifts: dict[str, Shift], file: Path) -> None:
    """Draw gain against forgetting of every shift."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, (name, shift) in zip(figure.subplots(1, len(shifts), squeeze=False)[0], shifts.items(), strict=True):
        draw_shift(axes, SHIFTS[name], shift)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, labelcolor=INK, fontsize=9)
    with rc_context({"svg.hashsalt": "means"}):
        figure.savefig(file, transparent=True, metadata={"Date": None})
    text = file.read_text()
    for stands_for, name in ((INK, "ink"), (SOFT, "soft"), (GRID, "grid")):
        text = text.replace(stands_for, f"var(--{name})")
    file.write_text(text.replace(" <defs>", f" {STYLE}\n <defs>", 1))


def draw_shift(axes: Axes, title: str, shift: Shift) -> None:
    """Draw one shift: a mark for each seed of each means, and the merge curve as a line."""
    curve = [(average(r, "gain"), average(r, "forgetting")) for _, r in sorted(shift.curve.items())]
    axes.plot(
        *zip(*curve, strict=True),
        color=SOFT,
        lw=1.2,
        ls=(0, (4, 2)),
        zorder=1,
        label="between base and full (α = 0 … 1)",
    )
    for (name, label), colour, marker in zip(NAMES.items(), COLOURS, "osD^vP*Xh", strict=True):
        found = shift.results.get(name, ())
        gains, forgettings = [r.gain for r in found], [r.forgetting for r in found]
        size = 90 if marker == "*" else 46
        axes.scatter(gains, forgettings, s=size, color=colour, marker=marker, linewidths=0, zorder=2, label=label)
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    axes.set_xlabel("gain on the new domain (nats per token) →", color=SOFT)
    axes.set_ylabel("forgetting of English (nats per token)", color=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GRID)
    axes.grid(color=GRID, lw=0.6)
    axes.tick_params(length=0, labelcolor=SOFT)
    axes.set_axisbelow(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--spanish", type=Path, help="a Spanish text: .txt, .jsonl …; default: the Bible of Debian's package"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/means"), help="of the runs; the same one resumes them"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time, on one core each"
    )
    parser.add_argument("--page", action="store_true", help="run nothing, write the page from the finished runs")
    given, words = parser.parse_known_args()
    folder = given.folder.absolute()
    if not given.page:
        text = given.spanish.absolute() if given.spanish else spanish(folder)
        spanish_words = ["dataset=local", f"dataset.nameOrPath={text}", "dataset.name=spanish"]
        run_sweep(folder / "python", given.jobs, words)
        run_sweep(folder / "spanish", given.jobs, [*spanish_words, *words])
    shifts = {name: shift_of(folder / name) for name in SHIFTS}
    for name, shift in shifts.items():
        print(f"{SHIFTS[name]}\n\n{table(shift)}")
    if not words:  # of other settings the page would say something else than it describes
        write_page(shifts)
        draw(shifts, PICTURE)


if __name__ == "__main__":
    main()
