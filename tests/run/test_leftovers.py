"""Nothing that a run has left is overwritten by the next command: it is refused, or what was there is kept aside."""

import json
import os
import shutil

import pytest

from pretrain.checkpoint.store import CheckpointStore
from pretrain.telemetry.run_file import read_run_file, write_json
from pretrain.telemetry.sinks.jsonl import read_records
from tests.cli.test_cli import assert_mistake
from tests.runs import assert_same_run, starts

SMALL = ["sink=jsonl", "evaluation.samples=0", "checkpoint.export=never", "max_steps=3", "evaluate_every=null"]


@pytest.fixture
def run(uninterrupted, tmp_path):
    """A copy of a finished run of 20 steps."""
    return shutil.copytree(uninterrupted, tmp_path / "run")


def content(folder):
    """Every file but the log and the lock, which each command writes."""
    files = (f for f in folder.rglob("*") if f.is_file() and f.name not in ("rank-0.log", ".lock"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def kill(run, steps):
    """As a kill leaves it: the run has not said its end."""
    write_json(run / "run.json", read_run_file(run) | {"status": "running", "steps": steps})
    shutil.rmtree(run / "model")


def test_a_finished_run_without_its_checkpoints_is_finished(run, base_arguments, command):
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    code, _, err = command([*base_arguments, f"output_dir={run}"])
    assert code == 0
    assert "is finished: 20 steps; model in " in err
    assert content(run) == before


@pytest.mark.parametrize("change", ["lr=0.5", "max_steps=30", "seed=1"])
def test_another_run_does_not_begin_over_it(change, run, base_arguments, command):
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    outcome = command([*base_arguments, f"output_dir={run}", change])
    assert_mistake(outcome, f"output_dir={run} holds a run of 20 steps (finished; model, metrics.jsonl, run.json)")
    assert f"{change.partition('=')[0]}: " in outcome[2]
    assert "resume=never to move it aside" in outcome[2]
    assert content(run) == before


def test_a_run_whose_checkpoints_are_all_damaged_is_kept_aside(run, uninterrupted, base_arguments, command, tmp_path):
    kill(run, 19)
    for checkpoint in (run / "checkpoints").glob("step-*"):
        (checkpoint / "COMPLETE.json").unlink()
    before = content(run)
    code, _, err = command([*base_arguments, f"output_dir={run}"])
    assert code == 0, err
    assert f"the earlier run is kept as {tmp_path / 'run.old-1'}" in err
    assert content(tmp_path / "run.old-1") == before
    assert_same_run(run, uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_begins_again_in_place(run, uninterrupted, base_arguments, command):
    """Its records are of steps that are about to be trained again: nothing is lost. Those of another run are kept."""
    kill(run, 3)
    shutil.rmtree(run / "checkpoints")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    first_save = next(n for n, line in enumerate(lines) if b'"event": "checkpoint"' in line)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:first_save]))
    (run / "checkpoints/step-00000005.partial").mkdir(parents=True)
    (run / "checkpoints/step-00000005.partial/state.json").write_text("{")
    killed = shutil.copytree(run, run.with_name("other"))
    code, _, err = command([*base_arguments, f"output_dir={run}"])
    assert code == 0, err
    assert_same_run(run, uninterrupted)
    assert "kept as" not in err
    before = content(killed)
    code, _, err = command([*base_arguments, *SMALL, f"output_dir={killed}"])
    assert code == 0, err
    assert content(run.with_name("other.old-1")) == before


def test_starting_over_beside_checkpoints_without_a_config(run, base_arguments, command, tmp_path):
    """The new run's own checkpoints have smaller numbers: beside those of step 20 they would be pruned as they are made."""
    for left in run.iterdir():
        if left.name != "checkpoints":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    code, _, err = command([*base_arguments, *SMALL, "save_every=1", f"output_dir={run}", "resume=never"])
    assert code == 0, err
    assert CheckpointStore(run / "checkpoints").complete_steps() == [2, 3]
    assert CheckpointStore(tmp_path / "run.old-1/checkpoints").complete_steps() == [15, 20]


def test_resuming_another_run_keeps_what_lies_there(run, uninterrupted, base_arguments, command, tmp_path):
    there = tmp_path / "there"
    code, _, err = command([*base_arguments, *SMALL, "seed=1", f"output_dir={there}"])
    assert code == 0, err
    before = content(there)
    named = [*base_arguments, f"output_dir={there}", f"resume={run / 'checkpoints/step-00000015'}"]
    code, _, err = command([*named, "seed=2"])
    assert code == 2
    assert content(there) == before, "a refused one moves nothing"
    code, _, err = command([*named, "sink=jsonl"])
    assert code == 0, err
    assert content(tmp_path / "there.old-1") == before
    assert starts(there) == [(15, True)]


def test_a_link_stays_a_link(base_arguments, command, tmp_path):
    """To a folder on another disk, say: the run is kept beside what the link leads to."""
    (tmp_path / "disk/runs").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk/runs/one")
    for n in range(2):
        code, _, err = command([*base_arguments, *SMALL, f"output_dir={tmp_path / 'run'}", "resume=never"])
        assert code == 0, err
        assert (tmp_path / "run").is_symlink()
        assert sorted(os.listdir(tmp_path / "disk/runs")) == ["one", "one.old-1"][: n + 1]


def test_the_folder_one_is_in_is_not_moved(run, base_arguments, command, monkeypatch):
    monkeypatch.chdir(run)
    before = content(run)
    assert_mistake(
        command([*base_arguments, "output_dir=.", "resume=never"]), "output_dir=.: the earlier run in it can't"
    )
    assert content(run) == before


def test_an_evaluation_keeps_the_one_before(base_arguments, command, tmp_path):
    given = [*base_arguments, "task=evaluation", "sink=jsonl", "evaluation.samples=0", f"output_dir={tmp_path / 'e'}"]
    assert command(given)[0] == 0
    before = content(tmp_path / "e")
    code, _, err = command([*given, "evaluation.max_tokens=300"])
    assert code == 0, err
    assert content(tmp_path / "e.old-1") == before
    tokens = [r["tokens"] for r in read_records(tmp_path / "e/metrics.jsonl") if r["event"] == "evaluation"]
    assert len(tokens) == 2
    assert_mistake(
        command([*base_arguments, f"output_dir={tmp_path / 'e'}"]), "holds an evaluation; choose another output_dir"
    )


@pytest.mark.parametrize("task", ["evaluation", "export"])
def test_other_tasks_leave_a_run_without_checkpoints_alone(task, run, base_arguments, tiny_model, command):
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    given = base_arguments if task == "evaluation" else [f"model_name={tiny_model}", "checkpoint.export_shard_size=5GB"]
    outcome = command([*given, f"task={task}", f"output_dir={run}"])
    assert_mistake(outcome, "holds a pretraining run" if task == "evaluation" else "holds a model already")
    assert content(run) == before


def test_generation_keeps_earlier_samples(tiny_model, command, tmp_path):
    given = ["task=generation", f"model_name={tiny_model}", "sequence_length=32", "generation.max_new_tokens=2"]
    for prompt in ("The", "sea", "road"):
        code, _, err = command([*given, f"generation.prompts=[{prompt}]", f"output_dir={tmp_path}"])
        assert code == 0, err
    prompts = [json.loads((tmp_path / f"samples{n}.jsonl").read_text())["prompt"] for n in (".old-1", ".old-2", "")]
    assert prompts == ["The", "sea", "road"]
    assert f"the earlier samples are kept as {tmp_path / 'samples.old-2.jsonl'}" in err
