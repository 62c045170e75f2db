"""The scripts that need a checkout."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.preloaded import run_preloaded

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name, *arguments, **options):
    return run_preloaded([SCRIPTS / name, *arguments], cwd=SCRIPTS.parent, **options)


@pytest.mark.slow
def test_bench_checkpoint(tmp_path):
    done = script("bench_checkpoint.py", "--rounds", "1", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^5\d\.\d M parameters, 1 rounds after the first", done.stdout, re.M)
    header, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert header[0] == "blocked s"
    took = {name: [float(cell) for cell in cells] for name, *cells in rows}
    assert {"ours", "ours, sync", "torch.save", "DCP", "DCP async"} <= took.keys()
    assert all(len(cells) == 5 for cells in took.values())
    assert not list(tmp_path.iterdir()), "what it wrote is taken away"


@pytest.mark.slow
def test_bench_train():
    done = script("bench_train.py", "--rounds", "1", "--steps", "4", "--only", "eager-bf16")
    assert done.returncode == 0, done.stderr
    speeds = dict(re.findall(r"^\| (ours|bare|trainer) \| ([\d,]+) \|", done.stdout, re.M))
    assert {"ours", "bare"} <= speeds.keys()
    assert float(re.search(r"ours to bare: (\S+)", done.stdout)[1]) < 1e-2, "all train on the same"


@pytest.mark.parametrize(
    "name",
    [
        *("bench_train.py", "bench_data.py", "bench_mixture.py", "bench_transforms.py", "make_means_matrix.py"),
        "bench_shared_tokenizing.py",
        *("bench_checkpoint.py", "bench_monitor.py", "bench_startup.py", "screenshots.py"),
    ],
)
def test_help(name):
    done = script(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "python scripts/" + name in done.stdout


def test_picture_of_a_console(tmp_path):
    assert script("picture_console.py", tmp_path).returncode == 2, "no run"
    started = {"event": "run_started", "step": 0, "total_steps": 1, "resumed": False, "model": "tiny", "device": "cpu"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(started) + "\n")
    done = script("picture_console.py", tmp_path, "--out", tmp_path / "console.png")
    if shutil.which("chromium") is None:
        assert (done.returncode, "chromium: not found" in done.stderr) == (2, True)
        return
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "console.png") as image:
        assert image.width > 1000, "a hundred columns"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20, "letters"
