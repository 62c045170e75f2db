"""Is the advice as good as a grid? The table of docs/advice.md: a grid of learning rates and replay shares against `task=advise`.

    OMP_NUM_THREADS=1 python scripts/make_advice_proof.py FOLDER              # the shipped sample learns Python
    OMP_NUM_THREADS=1 python scripts/make_advice_proof.py FOLDER --text es=es_biblia.txt --text sotu=sotu.jsonl --seeds 0,1
    OMP_NUM_THREADS=1 python scripts/make_advice_proof.py FOLDER --write      # also into docs/advice.md

Every run of the grid has the full length. The script can be stopped and started again: finished runs are kept in FOLDER. For each
text and seed it prints

front     how far the advised run is from the grid's Pareto front of gain and forgetting: how much a point of the grid is
          better on both axes (0: none is better; the claim is at most 0.02 nats per token)
share     the distance of its replay share from that of the grid's best sum of both roles' losses (the claim is at most 0.1)
cost      compute of the advice in that of the grid (the claim is at most 0.25), and of the planned run
inside    how many of the predicted changes were measured within their intervals (the claim is 8 of 10 over all rows)
default   what the default command gained and forgot
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/advice.md"
BEGIN, END = "<!-- proof -->\n", "<!-- end of proof -->\n"
RATES = ("1e-4", "3e-4", "1e-3", "3e-3")
SHARES = ("0", "0.1", "0.25", "0.5")
COMMON = [
    "evaluate_every=null",
    "save_every=null",
    "checkpoint.export=never",
    "sink=[jsonl,report]",
    "evaluation.samples=0",
]
HEAD = (
    "| text | seed | advised | gain, forgetting | default | front | share | cost of grid, of run | inside |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def run(folder: Path, words: list[str]) -> dict[str, Any]:
    """Run a command unless its run is finished; return its run.json."""
    file = folder / "run.json"
    if not file.exists() or json.loads(file.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "pretrain", *words, f"output_dir={folder}"]
        subprocess.run(command, cwd=ROOT, check=True)
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


def changes(facts: dict[str, Any]) -> tuple[float, float]:
    """Return gain and forgetting of a finished run."""
    found = {
        role: [r["delta_loss"] for r in facts["results"].values() if r["role"] == role] for role in ("new", "base")
    }
    return -sum(found["new"]) / len(found["new"]), sum(found["base"]) / len(found["base"])


def distance(point: tuple[float, float], grid: list[tuple[float, float]]) -> float:
    """Return how much the best point of the grid is better than ``point`` on both axes; 0 where none is."""
    return max(0.0, max(min(gain - point[0], point[1] - forgetting) for gain, forgetting in grid))


def row(folder: Path, name: str, data: list[str], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the results of a text and a seed; what is missing is run."""
    common = [*data, f"max_steps={options.steps}", f"seed={seed}"]
    grid = {
        (lr, share): changes(
            run(folder / f"grid/lr={lr},share={share}", [*common, *COMMON, f"lr={lr}", f"replay.share={share}"])
        )
        for lr in RATES[: options.grid]
        for share in SHARES[: options.grid]
    }
    advice = folder / "advice"
    asked = [f"advise.budget={options.budget}", *options.words]
    if not (advice / "advice.json").exists():
        command = [sys.executable, "-m", "pretrain", "task=advise", *common, *asked, f"output_dir={advice}"]
        subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((advice / "advice.json").read_text())
    facts = run(folder / "advised", ["--config-dir", str(advice), *common, *COMMON, "experiment=advised"])
    point = changes(facts)
    best = min(grid, key=lambda key: grid[key][1] - grid[key][0])
    same_length = {name: p for name, p in found["predicted"].items() if p["steps"] == options.steps}
    inside = [p["low"] <= facts["results"][name]["delta_loss"] <= p["high"] for name, p in same_length.items()]
    keys = dict(word.split("=", 1) for word in found["overrides"])
    return {
        "text": name,
        "seed": seed,
        "advised": f"lr {keys.get('lr', 'default')}, {float(keys.get('replay.share', 0)):.0%} old",
        "point": point,
        "default": changes(run(folder / "default", [*common, *COMMON])),
        "front": distance(point, list(grid.values())),
        "share": abs(float(keys.get("replay.share", 0)) - float(best[1])),
        "cost": (found["budget"]["spent"] / len(grid), found["budget"]["spent"]),
        "inside": (sum(inside), len(inside)),
    }


def line(one: dict[str, Any]) -> str:
    gain, forgetting = one["point"]
    cells = (
        one["text"],
        str(one["seed"]),
        one["advised"],
        f"{gain:.3f}, {forgetting:+.3f}",
        f"{one['default'][0]:.3f}, {one['default'][1]:+.3f}",
        f"{one['front']:.3f}",
        f"{one['share']:.2f}",
        f"{one['cost'][0]:.0%}, {one['cost'][1]:.0%}",
        f"{one['inside'][0]} of {one['inside'][1]}",
    )
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--text", action="append", default=[], help="name=file; without any: the embedded default, Python"
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--budget", type=float, default=2.0)
    parser.add_argument("--grid", type=int, default=4, help="learning rates and shares, up to 4 of each")
    parser.add_argument("--write", action="store_true")
    options, options.words = parser.parse_known_args()
    texts = {
        text.partition("=")[0]: ["dataset=local", f"dataset.nameOrPath={text.partition('=')[2]}"]
        for text in options.text
    }
    rows = []
    for name, data in (texts or {"python": []}).items():
        for seed in map(int, options.seeds.split(",")):
            rows.append(row(options.folder / f"{name}-{seed}", name, data, seed, options))
            print(HEAD + line(rows[-1]), flush=True)
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + HEAD + "".join(map(line, rows)) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
