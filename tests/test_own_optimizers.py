"""Whole runs with optimizers of other people: how they are named, what is said at the first checkpoint, and who can resume."""

import json

import pytest

from pretrain.checkpoint.store import load
from pretrain.telemetry.sinks.jsonl import read_records

pytestmark = pytest.mark.slow


@pytest.fixture
def run(base_arguments, exact_model, command, tmp_path):
    common = [
        *base_arguments,
        f"model_name={exact_model('llama-tied')}",
        "allow_targets=[tests.optimizers]",
        "sink=jsonl",
    ]
    common += ["save_every=2", "evaluate_every=null", "gradient_accumulation_steps=1"]

    def start(name, out, *more):
        target = [f"optimizer._target_=tests.optimizers.{name}"] if name else []
        return command([*common, *target, f"output_dir={tmp_path / out}", *more])

    return start


def trained(folder):
    return [(r["step"], r["loss"], r["lr"]) for r in read_records(folder / "metrics.jsonl") if r["event"] == "train"]


def test_optimizers_of_this_package(run, tmp_path):
    """Under ddp and fsdp they equal one process, the iteration of Muon and the means of Adafactor over sharded rows included."""
    for choice in ("muon", "adafactor", "adamw_8bit"):
        given = [f"optimizer={choice}", "max_steps=4", "scheduler=constant", "warmup_proportion=0", "lr=1e-2"]
        found = {}
        for name, words in (("one", ONE), ("ddp", [*TWO, "strategy=ddp"]), ("fsdp", TWO)):
            code, _, err = run(None, f"{choice} {name}", *words, *given)
            assert code == 0, err
            found[name] = [loss for _, loss, _ in trained(tmp_path / f"{choice} {name}")]
            if choice == "muon":
                log = (tmp_path / f"{choice} {name}/logs/rank-0.log").read_text()
                assert log.count("it is not known which optimizer") == 1
        assert found["ddp"] == pytest.approx(found["one"], abs=2e-4), choice
        assert found["fsdp"] == pytest.approx(found["one"], abs=2e-4), choice


TWO = ["strategy=fsdp", "devices=2", "batch_size=1"]
ONE = ["strategy=single", "batch_size=2"]
NOTICE = "of the checkpoint belong to one rank and can't be resharded: a resume needs 2 processes and the same strategy"


def test_state_of_the_local_shard(run, tmp_path):
    code, _, err = run("of_the_shard", "whole", *TWO, "max_steps=6")
    assert code == 0, err
    assert (tmp_path / "whole/logs/rank-0.log").read_text().count(NOTICE) == 1
    start = f"resume={tmp_path}/whole/checkpoints/step-00000004"
    code, _, err = run("of_the_shard", "again", *TWO, "max_steps=6", start)
    assert code == 0, err
    assert trained(tmp_path / "again") == trained(tmp_path / "whole")[4:]
    code, _, err = run("of_the_shard", "alone", *ONE, "max_steps=6", start)
    assert (code, "Traceback" in err) == (2, False)
    assert "was saved by each of 2 processes for itself and can't be resharded (this run has 1); resume with" in err


def test_two_optimizers_and_their_rates(run, tmp_path):
    for name, key in (("muon_and_adamw", "momentum_buffer"), ("groups", "exp_avg")):
        code, _, err = run(name, name, *TWO, "max_steps=4", "scheduler=cosine", "warmup_proportion=0")
        assert code == 0, err
        start = f"resume={tmp_path}/{name}/checkpoints/step-00000002"
        code, _, err = run(name, f"{name} alone", *ONE, "max_steps=4", "scheduler=cosine", "warmup_proportion=0", start)
        assert code == 0, err
        ours, theirs = trained(tmp_path / f"{name} alone"), trained(tmp_path / name)[2:]
        assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], abs=1e-5)
        assert [lr for *_, lr in ours] == [lr for *_, lr in theirs]
        assert trained(tmp_path / name)[0][2] == 1e-2, "the first group's"
        saved = load(tmp_path / name / "checkpoints/step-00000004")["engine"]["optimizer"]
        assert f"model.layers.0.mlp.up_proj.weight/{key}" in saved.keys()  # noqa: SIM118 (not a dict)
        identity = json.loads((tmp_path / name / "checkpoints/step-00000004/state.json").read_text())["identity"]
        assert identity["optimizer"] == [f"tests.optimizers.{name}", None]
    start = f"resume={tmp_path}/groups/checkpoints/step-00000002"
    code, _, err = run("scalars", "other", *ONE, "max_steps=4", start)
    assert (code, "optimizer._target_: tests.optimizers.groups → tests.optimizers.scalars" in err) == (2, True), err
    code, _, err = run("scalars", "other", *ONE, "max_steps=4", start, "resume_allow=[optimizer]")
    assert code == 0, err
    assert "the optimizer state starts empty" in err
