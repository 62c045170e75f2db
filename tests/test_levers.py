"""The shipped transforms from the command line: what is trained, exported and resumed, and mistakes."""

import json
import shutil

import pytest

from pretrain.checkpoint.store import load
from tests.runs import assert_same_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("levers")


@pytest.fixture
def start(folder, base_arguments, command):
    """``start(out, *arguments)`` → (exit code, stdout, stderr)."""
    common = [*base_arguments, "max_steps=6", "save_every=2", "checkpoint.keep_last=3", "evaluate_every=6"]
    return lambda out, *more: command([*common, f"output_dir={folder / out}", *more])


def error_of(err):
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    return line


def cut(run, again, step):
    """A copy of ``run`` as a kill after the checkpoint of ``step`` has left it."""
    shutil.copytree(run, again)
    shutil.rmtree(again / "model", ignore_errors=True)
    for later in range(step + 2, 8, 2):
        shutil.rmtree(again / f"checkpoints/step-{later:08d}")
    return again


def test_parameters_that_thaw_are_resumed_exactly_before_and_after(folder, start):
    words = ["transform=[freeze]", "transform.freeze.trainable=embed|norm", "transform.freeze.thaw_at=0.6"]
    words += ["optimizer.lr_multipliers={embed: 0.5}", "optimizer.layer_decay=0.9"]
    code, _, err = start("thawed", *words)
    assert code == 0, err
    states = {
        step: {
            n.partition("/")[0]
            for n in load(folder / f"thawed/checkpoints/step-{step:08d}")["engine"]["optimizer"].keys()
        }
        for step in (2, 4, 6)
    }
    assert states[2] == states[4]
    assert all("embed" in name or "norm" in name for name in states[2])
    assert len(states[6]) > len(states[2])
    for step in (2, 4):
        again = cut(folder / "thawed", folder / f"again-{step}", step)
        code, _, err = start(again.name, *words)
        assert code == 0, err
        assert_same_run(again, folder / "thawed")
    facts = json.loads((folder / "thawed/run.json").read_text())
    assert facts["trained_parameters"] == facts["parameters"]
