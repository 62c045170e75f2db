"""The programs of `pretrain.tools`."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests.launch.test_launch import PAIR
from tests.preloaded import run_preloaded
from tests.runs import ROOT, injected


def tool(name, *arguments, **options):
    return run_preloaded(["-m", f"pretrain.tools.{name}", *arguments], **options)


def verdict(done):
    """The words of the table's ddp row, without its numbers."""
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith(" ddp ")]
    return row[3]


@pytest.fixture
def verify(base_arguments, exact_model):
    def run(*more):
        given = [*base_arguments, f"model_name={exact_model('llama')}", "max_steps=3", "strategy=single"]
        return tool("verify_strategies", *given, "--only", "ddp", "--devices", "2", *more)

    return run


@pytest.mark.slow
def test_verify_strategies_agree(verify, tmp_path):
    done = verify(f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert verdict(done) == "yes"
    assert "2 processes × batch_size 2, single 4 at once; precision 32-true" in done.stdout
    assert "not measured: as given: devices=2: strategy=single is one process" in done.stdout
    assert not (tmp_path / "run").exists(), "the user's output_dir is not touched"


@pytest.mark.slow
def test_verify_strategies_differ(verify):
    """bf16 rounds: a bound of nothing can't be met by sums that are taken in another order."""
    done = verify("precision=bf16-mixed", "--bound", "0")
    assert done.returncode == 1, done.stderr
    assert verdict(done) == "no"


def test_verify_strategies_on_a_mistake(verify):
    done = verify("dataset.nameOrPath=no/such/folder")
    assert done.returncode == 2
    assert done.stderr.count("no/such/folder") == 1
    assert "Traceback" not in done.stderr

    done = tool("verify_strategies", "--only", "dpd")
    assert done.returncode == 2
    assert "dpd: allowed are" in done.stderr


def test_verify_resume(base_arguments, tmp_path):
    done = tool("verify_resume", *base_arguments, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == "equal"
    assert re.search(r"resumed from step (4|8)", done.stdout), "a slow machine may have saved once more before the kill"
    assert not (tmp_path / "run").exists(), "the user's output_dir is not touched"


FORGETFUL = "import torch\ntorch.set_rng_state = lambda state: None\n"
DISORDERLY = """
from pretrain.data.loader import Loader
def load_state_dict(self, state):
    self.samples = state["samples"]
    self.permutation = type(self.permutation)(len(self.blocks), 4711)
Loader.load_state_dict = load_state_dict
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "differ"),
    [
        (FORGETFUL, {"weights", "moments", "random states", "progress", "metrics"}),
        (DISORDERLY, {"weights", "moments", "progress", "metrics", "data order"}),
    ],
    ids=["random states", "data order"],
)
@pytest.mark.parametrize("more", [[], PAIR], ids=["single", "pair"])
def test_verify_resume_finds_what_differs(more, fault, differ, base_arguments, tmp_path):
    """A resume that forgets the random states (the model has dropout), or continues in another order."""
    done = tool("verify_resume", *base_arguments, *more, env=injected(tmp_path, fault))
    assert done.returncode == 1, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == "NOT equal"
    assert {line.strip().split("  ")[0] for line in done.stdout.splitlines() if " NO " in line} == differ, done.stdout


@pytest.mark.slow
def test_verify_resume_of_a_flat_file(corpus, tiny_model, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"model_name: {tiny_model}\ndataset: {{source: local, nameOrPath: {corpus}}}\nbatch_size: 2\n"
    )
    done = tool("verify_resume", "--config", tmp_path / "run.yaml", "sequence_length=32", "--bound", "1e-9")
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == "equal"


def test_what_is_no_number_is_never_equal():
    from pretrain.tools.verify_resume import _tensors, _values, _worst

    class Files(dict):
        shape = staticmethod(lambda name: (3,))
        read = dict.__getitem__

    weights = Files(a=torch.tensor([1.0, 2.0, math.inf]), b=torch.zeros(3))
    others = Files(a=torch.tensor([1.0, math.nan, math.inf]), b=torch.full((3,), 0.5))
    assert _worst(_tensors(weights, others)) == (math.inf, "a")
    assert _worst(_tensors(Files(b=weights["b"]), Files(b=others["b"]))) == (0.5, "b")
    assert _worst(_values([0.0, math.nan], [5.0, 1.0])) == (math.inf, "[1]")


def test_verify_resume_on_a_mistake():
    done = tool("verify_resume", "dataset=local", "dataset.nameOrPath=no/such/folder")
    assert done.returncode == 2
    assert "no/such/folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_that_differ(base_arguments, command, tmp_path):
    """What the scripts call equal, they would call different."""
    from pretrain.tools.soak import Soak
    from pretrain.tools.verify_resume import compare, show

    for name, seed in (("a", 1), ("b", 2)):
        code, _, err = command([*base_arguments, f"output_dir={tmp_path / name}", f"seed={seed}", "max_steps=5"])
        assert code == 0, err
    found = compare(tmp_path / "a", tmp_path / "b")
    differ = {name for name, difference in found.items() if difference.largest}
    assert {"weights", "moments", "random states", "metrics"} <= differ
    assert not show(found, bound=0.0)
    assert show(compare(tmp_path / "a", tmp_path / "a"), bound=0.0)
    soak = Soak(tmp_path, tmp_path, with_disk=False)
    soak.check_end(tmp_path / "a", tmp_path / "a")
    assert soak.wrong_steps == 0
    soak.check_end(tmp_path / "b", tmp_path / "a")
    assert soak.wrong_steps > len(differ), "of the exported model, too"


@pytest.mark.parametrize(("went_on_from", "lost"), [(12, 12), (24, 0), (30, 0)])
def test_the_soak_finds_lost_steps(went_on_from, lost, tmp_path):
    """Of the last start; what an earlier one did is over."""
    from pretrain.tools.soak import Soak

    starts = [{"event": "run_started", "step": 0, "resumed": False, "time": 1.0}]
    starts += [{"event": "run_started", "step": went_on_from, "resumed": True, "time": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    soak = Soak(tmp_path, tmp_path, with_disk=False)
    soak.check_start(tmp_path, 24, began_at=4.0)
    assert (soak.resumes, soak.lost_steps) == (0, 0), "it was killed before it said anything"
    soak.check_start(tmp_path, 24, began_at=2.0)
    assert (soak.resumes, soak.lost_steps) == (1, lost)


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("soak", signal.SIGINT, "faults: 0 ()"),
        pytest.param("soak", signal.SIGTERM, "faults: 0 ()", marks=pytest.mark.slow),
        pytest.param("verify_resume", signal.SIGINT, "stopped", marks=pytest.mark.slow),
        pytest.param("verify_resume", signal.SIGTERM, "stopped", marks=pytest.mark.slow),
    ],
)
def test_a_script_that_is_stopped_leaves_no_run_behind(name, number, said, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", f"pretrain.tools.{name}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        while not (runs := [c for c in psutil.Process(process.pid).children() if "pretrain" in c.cmdline()]):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)  # it was just about to look after it
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (0 if name == "soak" else 1), out
    assert said in out
    assert "Traceback" not in out
    assert not psutil.wait_procs(runs, timeout=5)[1]
    assert not list(tmp_path.iterdir()), "its folder is removed"


@pytest.mark.slow
def test_soak():
    done = tool("soak", "--minutes", "2")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "lost steps: 0 · wrong steps: 0" in done.stdout


@pytest.mark.parametrize("name", ["report", "soak", "verify_resume", "verify_strategies"])
def test_the_script_of_the_same_name(name):
    """It starts the tool."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m pretrain.tools.{name} ")
