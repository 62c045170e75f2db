"""`task=advise` from the command line: its mistakes, and a whole advice."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from pretrain.telemetry.run_file import read_run_file

SMALL = ["sequence_length=32", "batch_size=2", "evaluation.max_tokens=400", "evaluation.samples=0", "lr=3e-3"]


@pytest.fixture
def words(tiny_model, corpus, other_corpus):
    texts = [f"dataset.nameOrPath={corpus}", "dataset@evaluation.domains.base=local"]
    texts += [f"evaluation.domains.base.nameOrPath={other_corpus}"]
    return [f"model_name={tiny_model}", "dataset=local", *texts, *SMALL]


def test_mistakes_end_with_one_line(words, command, tmp_path):
    """Before a probe starts."""
    for more, expected in (
        (["max_steps=5"], "the planned run has 5 steps, and a probe has at least 8"),
        (["max_steps=100", "advise.budget=0"], "advise.budget=0: input should be greater than 0"),
        (["max_steps=100", "advise.budget=0.01"], "too little for any probe of 8 steps"),
        (["max_steps=100", "advise.steps=[rates]"], "input should be 'look', 'lr', 'share'"),
        (["max_steps=100", "advise.steps=[means]"], "read the runs of the other steps; add lr or share"),
        (["max_steps=100", "advise.bugdet=1"], "did you mean 'budget'"),
        (["max_steps=100", "dataset.held_out=0"], "dataset.held_out=0: no new text is held out"),
        (["max_steps=100", "model=scratch"], "starts from random weights, which can't forget"),
    ):
        code, _, err = command(["task=advise", *words, *more, f"output_dir={tmp_path / 'advice'}"])
        assert code == 2, more
        assert expected in err, err
        assert len(err.strip().splitlines()[-1]) < 400
    assert not (tmp_path / "advice/probes").exists()


def test_a_look(words, command, tmp_path):
    """In this process, and again without scoring."""
    asked = ["task=advise", *words, "max_steps=100", "advise.steps=[look]", "advise.budget=5", f"output_dir={tmp_path}"]
    code, out, err = command(asked)
    assert code == 0, err
    assert out.startswith("Use the command as it is.")
    advice = json.loads((tmp_path / "advice.json").read_text())
    assert advice["overrides"] == []
    assert advice["predicted"] == {}
    roles = {name: domain["role"] for name, domain in advice["look"]["domains"].items()}
    assert sorted(roles.values()) == ["base", "new"]
    assert all(0.1 < domain["tokens_per_byte"] < 1.5 for domain in advice["look"]["domains"].values())
    assert "Model and text" in (tmp_path / "advice.html").read_text()
    before = (tmp_path / "scores.json").stat().st_mtime_ns
    assert command(asked)[0] == 0
    assert (tmp_path / "scores.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_rates_that_diverge(words, command, tmp_path):
    """Do not end the advice, nor does a benchmark that the budget does not count reach the probes."""
    (tmp_path / "own.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n')
    asked = ["task=advise", *words, "max_steps=60", "advise.budget=6", "advise.probe_steps=12", "advise.rates=3"]
    asked += ["lr=3e20", "advise.steps=[lr]", f"+evaluation.questions.own={tmp_path / 'own.jsonl'}"]
    code, _, err = command([*asked, f"output_dir={tmp_path / 'advice'}"])
    assert code == 2
    assert "every learning rate that was tried diverged; set a smaller lr" in err, err
    assert "own" not in (next((tmp_path / "advice/probes").glob("*/*/config.yaml"))).read_text()


@pytest.mark.slow
def test_a_whole_advice_that_is_killed(words, spawn, command, tmp_path):
    """Killed in a probe, continued by the same command; the experiment runs and its report compares."""
    asked = [
        "task=advise",
        *words,
        "max_steps=60",
        "advise.budget=6",
        "advise.probe_steps=16",
        "advise.max_forgetting=5",
    ]
    asked.append(f"output_dir={tmp_path / 'advice'}")
    process = spawn(asked)
    deadline = time.monotonic() + 240
    while len([*(tmp_path / "advice/probes").glob("*/*/run.json")]) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = next(iter(sorted((tmp_path / "advice/probes").glob("*/*/run.json"), key=lambda f: f.stat().st_mtime)))
    written = first.stat().st_mtime_ns
    code, out, err = command(asked)
    assert code == 0, err
    assert first.stat().st_mtime_ns == written, "a finished probe is not repeated"
    advice = json.loads((tmp_path / "advice/advice.json").read_text())
    assert advice["budget"]["spent"] <= advice["budget"]["share"] == 6
    assert {run["kind"] for run in advice["probes"]} >= {"share", "lr"}
    assert [word.partition("=")[0] for word in advice["overrides"]] == ["lr", "replay.share", "max_steps"]
    assert advice["command"] in out
    assert not [*(tmp_path / "advice/probes").glob("*/*/checkpoints")]
    run = ["--config-dir", str(tmp_path / "advice"), *words, "experiment=advised", f"output_dir={tmp_path / 'run'}"]
    run = [word for word in run if word != "lr=3e-3"]
    code, _, err = command(run)
    assert code == 0, err
    assert read_run_file(tmp_path / "run")["steps"] == 60
    assert "Predicted by task=advise, and measured" in (tmp_path / "run/report.html").read_text()
    assert Path(tmp_path / "advice/advice.html").read_text().count("report.html") >= len(advice["probes"])
