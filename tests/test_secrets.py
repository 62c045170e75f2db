"""No secret reaches a file of a run or the terminal: planted ones are searched for in every byte (docs/security.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.redact import redact
from tests.launch.test_launch import PAIR
from tests.runs import injected
from tests.test_cli import assert_mistake

HF = "hf_" + "PlantedPlantedPlanted"
PLANTED = {
    "HF_TOKEN": HF,
    "HUGGING_FACE_HUB_TOKEN": "hub-planted-4711",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "planted!",
    "MY_DB_PASSWORD": "planted-password",
    "CLOUD_SECRET_KEY": "planted/secret+key=",
}
IN_FILES = ("planted-in-token-file", "planted-in-netrc")


@pytest.fixture
def planted(tmp_path, monkeypatch) -> list[str]:
    """The secrets that this process and its children can know."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "token").write_text(IN_FILES[0] + "\n")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {IN_FILES[1]}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return [*PLANTED.values(), *IN_FILES]


QUOTING = """
import os, torch
step = torch.optim.AdamW.step
def broken(*given, **named):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("broken: " + repr(os.environ["PLANTED"].split()))
    return step(*given, **named)
torch.optim.AdamW.step = broken
"""


def assert_nowhere(secrets: list[str], folder: Path, *texts: str) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    leaks = [(file, s) for file in files for s in secrets if s.encode() in file.read_bytes()]
    assert leaks == []
    assert [(s, text) for text in texts for s in secrets if s in text] == []


def test_a_run_leaves_none(planted, spawn, base_arguments, tmp_path):
    """Nor one that stood on the command line, as the name of a variable, and lost to a later word."""
    run = tmp_path / "run"
    process = spawn([*base_arguments, f"output_dir={run}", "name=${oc.env:WANDB_API_KEY}", "name=books"])
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    written = {file.relative_to(run).parts[0] for file in run.rglob("*") if file.is_file()}
    assert {
        "config.yaml",
        ".hydra",
        "run.json",
        "metrics.jsonl",
        "logs",
        "report.html",
        "checkpoints",
        "model",
    } <= written
    assert_nowhere(planted, run, text)


@pytest.mark.slow
def test_no_sink_writes_any(planted, spawn, base_arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    process = spawn([*base_arguments, f"output_dir={run}", "sink=[csv,tensorboard,wandb]"])
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    names = {file.name.partition(".")[0] for file in run.rglob("*") if file.is_file()}
    assert "events" in names, "TensorBoard's"
    assert list(run.rglob("*.csv"))
    assert list(run.rglob("*.wandb"))
    assert_nowhere(planted, run, text)


@pytest.mark.slow
def test_a_rank_that_fails_says_none(planted, spawn, base_arguments, tmp_path, monkeypatch):
    """Its exception quotes every secret: to the parent, who tells it, and in its log."""
    monkeypatch.setenv("PLANTED", " ".join(planted))
    run = tmp_path / "run"
    process = spawn([*base_arguments, *PAIR, f"output_dir={run}"], env=injected(tmp_path, QUOTING))
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 1, text
    assert "RuntimeError: broken: ['***', " in text
    assert "RuntimeError: broken: ['***', " in (run / "logs/rank-1.log").read_text()
    assert_nowhere(planted, run, text)


def test_a_failure_says_none(planted, base_arguments, tmp_path):
    """A library's exception that quotes every secret: in the traceback on the terminal and in the log."""
    run = tmp_path / "run"
    code = (
        "import os, torch\n"
        "def broken(*a, **k): raise RuntimeError('broken: ' + repr(os.environ['PLANTED'].split()))\n"
        "torch.optim.AdamW.step = broken\n"
        "from pretrain.cli import program\nprogram()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *base_arguments, f"output_dir={run}"],
        env=os.environ | {"PLANTED": " ".join(planted)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: broken: ['***', " in done.stderr
    assert "RuntimeError: broken: ['***', " in (run / "logs" / "rank-0.log").read_text()
    assert_nowhere(planted, run, done.stdout, done.stderr)


CONFIGS = {
    "an interpolated variable": ("name=${oc.env:WANDB_API_KEY}", "name: holds the value of $WANDB_API_KEY"),
    "inside a text": ("dataset.name=x${oc.env:MY_DB_PASSWORD}x", "the value of $MY_DB_PASSWORD"),
    "a key": ("+model.overrides={planted-password: 1}", "the value of $MY_DB_PASSWORD"),
    "an item": ("generation.prompts=[a,planted-in-token-file]", "the token in "),
    "from netrc": (f"model.tokenizer_name={IN_FILES[1]}", "the password of api.wandb.ai"),
    "looks like one": ("dataset.name=hf_NobodysNobodysNobodys", "holds a Hugging Face token"),
    "a URL": ("dataset.nameOrPath=https://me:letmein@host/data", "holds a password in a URL"),
}


@pytest.mark.parametrize("mode", [[], ["-m", "seed=0,1"]])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_may_hold_none(name, mode, planted, command, base_arguments, tmp_path, monkeypatch):
    """Refused before a folder is made; the message names the place, not the secret. A sweep stops at it too."""
    monkeypatch.chdir(tmp_path)
    override, says = CONFIGS[name]
    outcome = command([*mode, *base_arguments, f"output_dir={tmp_path / 'run'}", override])
    secrets = [*planted, "hf_NobodysNobodysNobodys", "letmein"]
    if not mode or "${" not in override:
        assert_mistake(outcome, says)
    assert outcome[0] == 2
    assert not (tmp_path / "run").exists()
    multirun = tmp_path / "multirun"
    assert_nowhere(secrets, multirun, *outcome[1:])


def test_a_file_may_hold_none(planted, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "theirs.yaml").write_text(f"# @package _global_\nname: {HF}\n")
    for mode in ([], ["-m"]):
        outcome = command(["--config-dir", str(tmp_path), "experiment=theirs", *mode])
        assert_mistake(outcome, "holds the value of $HF_TOKEN")
        assert_nowhere(planted, tmp_path / "multirun", *outcome[1:])
    (tmp_path / "flat.yaml").write_text(f"experiment_name: {HF}\n")
    for mode in ([], ["-m"]):
        outcome = command(["--config", "flat.yaml", *mode])
        assert_mistake(outcome, "holds the value of $HF_TOKEN")
        assert_nowhere(planted, tmp_path / "multirun", *outcome[1:])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "harmless-value"),
        ("HF_TOKEN_PATH", "/a/harmless/path"),
        ("MY_SECRET", "short"),
        ("ANYTHING", "harmless-value"),
    ],
)
def test_what_is_no_secret_stays(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    text = f"{value} https://huggingface.co/x git@host:x/y 81ca0264f621816b6c89d9dc0a283c70d9d9081ca hf_short"
    assert redact(text) == text


def test_a_value_inside_another_goes_with_it(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghijkl")
    assert redact("x abcdefghijkl y abcdefgh z") == "x *** y *** z"
