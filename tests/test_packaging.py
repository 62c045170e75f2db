"""The wheel carries the configuration and the sample model, and runs from a place of its own."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"  # a build leaves files behind, which have no business in the checkout
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        source = ROOT / name
        if name.startswith(("pretrain/", "conf/", "pyproject", "README", "LICENSE")) and source.is_file():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, copy]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_all_of_conf_and_the_sample_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "conf"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {f"pretrain/{name}" for name in tracked.split()} <= names
    assert {f"pretrain/models/sample/{n}" for n in ("config.json", "model.safetensors", "tokenizer.json")} <= names
    assert {"pretrain/py.typed", "pretrain/tools/data_order/sitecustomize.py"} <= names
    assert not [n for n in names if n.startswith(("conf/", "tests/", "scripts/"))]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder into which the wheel alone is installed."""
    site = tmp_path_factory.mktemp("installed") / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(command, check=True)
    return site


@pytest.fixture
def start(installed, tmp_path):
    """Start a module from an empty folder, with the installed wheel as the only copy of the package."""

    def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def made(start, tmp_path, base_arguments):
    """A run of two steps, made by the installed package."""
    done = start("pretrain", *base_arguments, "max_steps=2", "model_name=sample", "output_dir=run")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def test_it_runs_from_elsewhere(made, start, installed):
    """The run, and then its report."""
    assert (made / "model/model.safetensors").exists()
    where = start("timeit", "-n1", "-r1", "import pretrain.config.check as c; print(c.__file__, c.conf_dir())")
    assert where.stdout.count(str(installed)) == 2, where
    done = start("pretrain.tools.report", "run", "--output", "page.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, "page.html\n", "")
    assert "step 2 of 2" in (made.parent / "page.html").read_text()


def test_nothing_is_imported_from_the_checkout():
    """Neither tests nor scripts are in the wheel."""
    outside = {"tests", "scripts", *(file.stem for file in (ROOT / "scripts").iterdir())}
    for file in (ROOT / "pretrain").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not outside & {name.partition(".")[0] for name in names}, file


@pytest.mark.parametrize("name", ["soak", "verify_resume", "verify_strategies"])
def test_help_of_an_installed_tool(name, start):
    done = start(f"pretrain.tools.{name}", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m pretrain.tools.{name}" in done.stdout


@pytest.mark.slow
def test_installed_tools_at_work(start, base_arguments):
    done = start("pretrain.tools.verify_resume", *base_arguments)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "equal"), done.stderr
    assert "data order      0" in done.stdout, "the hashes of what it trained on"
    done = start("pretrain.tools.verify_strategies", *base_arguments, "max_steps=2", "--only", "ddp", "--devices", "2")
    assert done.returncode in (0, 1), done.stderr  # the model has dropout
    assert " ddp " in done.stdout
    done = start("pretrain.tools.soak", "--minutes", "0.5")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "lost steps: 0 · wrong steps: 0" in done.stdout


def test_every_package_is_listed():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "pretrain").rglob("__init__.py")}
    assert set(listed) == there | {"pretrain.conf"}
