"""How many small mistakes in the code the tests notice: mutmut makes them one at a time, in a copy of the project.

    python scripts/mutation.py [GROUP ...] [--sample N] [--seed 0] [--jobs 1] [--folder DIR] [--list]

A group is a few modules with the fast tests that are meant for them, in pyproject.toml under [tool.mutation.groups]; without
names all of them are measured. Of a mistake in a function those tests of the group are run that call the function. ``--sample``:
so many mistakes of a group at most, drawn with ``--seed``, where all would take too long; the table says how many there were.

noticed: a test fails, or takes far longer than before (a loop without end) · survived: all tests pass · no test: none calls the
function. mutmut does not touch code outside functions, functions with a decorator (but static and class methods), and lines
with ``# pragma: no mutate``. The survivors are printed as diffs; docs/reliability.md gives the reason of each.

Exit code 0: at least ``--goal`` percent of every group are noticed; 1: not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code

ROOT = Path(__file__).resolve().parent.parent
NOTICED = {"killed", "timeout", "segfault", "suspicious", "caught by type check"}
COPIED = ("pretrain", "conf", "tests", "scripts", "docs", "README.md")
NAMED_AT_MOST = 500  # mistakes on one command line


@dataclass(frozen=True)
class Group:
    """Modules (paths in the repository), and the tests that are meant to notice a mistake in them."""

    name: str
    modules: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """``outcomes``: name of a mistake → mutmut's word for what came of it. ``total``: of all mistakes, measured or not."""

    group: Group
    total: int
    outcomes: dict[str, str]

    @property
    def noticed(self) -> int:
        return sum(outcome in NOTICED for outcome in self.outcomes.values())

    @property
    def share(self) -> float:
        return 100 * self.noticed / max(len(self.outcomes), 1)


def groups() -> dict[str, Group]:
    """What pyproject.toml says."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"]["groups"]
    return {name: Group(name, tuple(table["modules"]), tuple(table["tests"])) for name, table in tables.items()}


def mistakes(group: Group) -> list[str]:
    """The names of all mistakes that mutmut can make in the group's modules, in their order in the files."""
    found = []
    for module in group.modules:
        dotted = module.removesuffix(".py").replace("/", ".")
        made = mutate_file_contents(module, (ROOT / module).read_text())
        found += [f"{dotted}.{name}" for name in made.mutant_names]
    return found


def work_folder(group: Group, folder: Path) -> Path:
    """A copy of the project in which mutmut changes this group's modules alone."""
    place = folder / group.name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place)
    lists = {
        "only_mutate": list(group.modules),
        "pytest_add_cli_args_test_selection": list(group.tests),
        "also_copy": [name for name in COPIED if name not in ("pretrain", "tests")],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in lists.items()]  # a list of strings: TOML as well as JSON
    given = (ROOT / "pyproject.toml").read_text()
    changed = given.replace("\n[tool.mutmut]\n", "\n".join(["", "[tool.mutmut]", *lines, ""]))
    assert changed != given, "pyproject.toml has a section [tool.mutmut]"
    (place / "pyproject.toml").write_text(changed)
    return place


def measure(group: Group, folder: Path, *, names: list[str], every: bool, jobs: int) -> dict[str, str]:
    """Make the mistakes ``names`` (``every``: they are all there are) one at a time; what came of each.

    Raises ``RuntimeError`` with mutmut's last words where it could not: the tests fail on the code as it is, say.
    """
    place = work_folder(group, folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs)]
    for first in range(0, 1 if every else len(names), NAMED_AT_MOST):
        some = [] if every else names[first : first + NAMED_AT_MOST]
        done = subprocess.run(
            [*command, *some], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            words = [line.split("\r")[-1] for line in (done.stdout + done.stderr).splitlines()]
            raise RuntimeError("\n".join([f"{group.name}: mutmut left with {done.returncode}", *words[-40:]]))
    codes: dict[str, int | None] = {}
    for module in group.modules:
        codes |= json.loads((place / "mutants" / f"{module}.meta").read_text())["exit_code_by_key"]
    return {name: status_by_exit_code[codes[name]] for name in names}


def show(result: Result, place: Path) -> None:
    """The mistakes that no test noticed, each as a diff of its lines."""
    for name, outcome in result.outcomes.items():
        if outcome in NOTICED:
            continue
        done = subprocess.run(
            [sys.executable, "-m", "mutmut", "show", name], cwd=place, capture_output=True, text=True, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        print(f"\n{outcome}: {name}", *lines, sep="\n  ", flush=True)


def table(results: list[Result]) -> str:
    rows = [("group", "mistakes", "made", "noticed", "survived", "no test", "share")]
    for result in results:
        counts = Counter(result.outcomes.values())
        made, other = len(result.outcomes), counts["survived"]
        numbers = (result.total, made, result.noticed, other, made - result.noticed - other)
        rows.append((result.group.name, *map(str, numbers), f"{result.share:.1f} %" if made else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = (
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    )
    return "\n".join("  ".join(row) for row in aligned)


def main() -> int:
    known = groups()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(known))
    parser.add_argument("--sample", type=int, help="mistakes of a group at most (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="mistakes at the same time")
    parser.add_argument("--folder", type=Path, help="where the copies go (default: a temporary folder)")
    parser.add_argument("--goal", type=float, default=90.0, help="percent of each group that must be noticed")
    parser.add_argument("--list", action="store_true", help="say only how many mistakes there are")
    given = parser.parse_args()
    if unknown := set(given.groups) - set(known):
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        for name in given.groups or known:
            names = every = mistakes(known[name])
            if given.sample is not None and given.sample < len(every):
                names = sorted(random.Random(given.seed).sample(every, given.sample), key=every.index)
            outcomes = {}
            if not given.list:
                outcomes = measure(known[name], folder, names=names, every=names is every, jobs=given.jobs)
            results.append(Result(known[name], len(every), outcomes))
            if not given.list:
                show(results[-1], folder / name)
                print(f"\n{table(results[-1:])}", flush=True)
    print(f"\n{table(results)}")
    if given.sample is not None:
        print(f"at most {given.sample} mistakes a group, drawn with seed {given.seed}")
    return 0 if given.list or all(result.share >= given.goal for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
