"""Interrupted and resumed equals uninterrupted, bit for bit: weights, moments, data, random numbers, records."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from pretrain.checkpoint.store import load
from pretrain.checkpoint.weights import weights_folder
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.runs import assert_same_run, kill_and_resume, numbers, wait_for


@pytest.mark.parametrize("at", [7, 19])
def test_kill_9_and_the_same_command(at, uninterrupted, base_arguments, command, spawn, tmp_path):
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}"]
    process = spawn(arguments)
    wait_for(run, at, process)
    time.sleep(random.random() * 0.05)
    process.kill()
    process.wait()
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_run(run, uninterrupted)


def test_records_that_did_not_reach_the_disk_come_with_the_checkpoint(uninterrupted, base_arguments, command, tmp_path):
    """As a full disk leaves it, or a machine that lost power: the checkpoint is whole, the records before it are not."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "run.json").unlink()
    shutil.rmtree(run / "model")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    saved = next(n for n, line in enumerate(lines) if b'"checkpoint"' in line and json.loads(line)["step"] == 15)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[: saved + 2]) + lines[saved + 2][:20])
    code, _, err = command([*base_arguments, f"output_dir={run}"])
    assert code == 0, err
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("strategy", ["fsdp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ddp", "deepspeed"))])
def test_kill_9_of_two_processes_and_the_same_command(strategy, base_arguments, command, spawn, tmp_path):
    """The model has dropout: each rank continues with its own random numbers."""
    pair = [*base_arguments, f"strategy={strategy}", "devices=2", "batch_size=1"]
    code, _, err = command([*pair, f"output_dir={tmp_path / 'whole'}"])
    assert code == 0, err
    run = tmp_path / "run"
    kill_and_resume(pair, run, command, spawn, at=12)
    assert numbers(run) == numbers(tmp_path / "whole")
    states = [load(folder / "checkpoints/step-00000020")["engine"] for folder in (run, tmp_path / "whole")]
    for kind in ("model", "optimizer"):
        ours, theirs = (state[kind] for state in states)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours.read(key), theirs.read(key)) for key in sorted(theirs.keys()))


@pytest.mark.slow
def test_a_signal_saves_and_exits_75(uninterrupted, base_arguments, command, spawn, tmp_path):
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}"]
    stops = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = spawn(arguments)
        wait_for(run, 4 * stops + 3, process)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        if process.returncode == 0:  # the machine was quicker than the signal
            break
        stops += 1
        assert process.returncode == 75, out
        facts = read_run_file(run)
        assert facts["status"] == "stopped"
        assert (run / f"checkpoints/step-{facts['steps']:08d}/COMPLETE.json").exists(), (
            "the step it stopped at is saved"
        )
    assert stops > 0
    code, _, err = command(arguments)
    assert code == 0, err
    assert numbers(run) == numbers(uninterrupted)


def test_resume_from_a_named_checkpoint_leaves_the_other_branch(uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    code, _, err = command([*base_arguments, f"output_dir={run}", "checkpoint.keep_last=null"])
    assert code == 0, err
    arguments = [*base_arguments, f"output_dir={run}", "checkpoint.keep_last=null"]
    code, _, err = command([*arguments, f"resume={run}/checkpoints/step-00000005"])
    assert code == 0, err
    assert "step-00000020 belongs to a branch that was abandoned" in err
    assert_same_run(run, uninterrupted)


def test_resume_from_a_run_is_from_its_newest_whole_checkpoint(uninterrupted, base_arguments, command, tmp_path):
    named, run = tmp_path / "named", tmp_path / "run"
    shutil.copytree(uninterrupted, named)
    shutil.copytree(named / "checkpoints/step-00000020", named / "checkpoints/step-00000021")
    (named / "checkpoints/step-00000021/optimizer.safetensors").write_bytes(b"torn")
    before = sorted(named.rglob("*"))
    code, _, err = command([*base_arguments, f"output_dir={run}", f"resume={named}", "max_steps=22"])
    assert code == 0, err
    assert "step-00000021 skipped" in err
    steps = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    assert steps == [21, 22]
    brought = json.loads((named / "checkpoints/step-00000020/state.json").read_text())["records"]
    assert brought
    kept = read_records(run / "metrics.jsonl")
    assert kept[0]["event"] == "run_started"
    assert not [r for r in kept if r in brought], "they are the named run's"
    assert sorted(named.rglob("*")) == before, "the run that is named stays as it is"


def test_a_torn_checkpoint_is_passed_over(uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest = run / "checkpoints/step-00000020/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    (run / "run.json").unlink()
    code, _, err = command([*base_arguments, f"output_dir={run}"])
    assert code == 0, err
    assert "step-00000020 skipped: optimizer.safetensors has" in err
    assert_same_run(run, uninterrupted)


def test_the_end_of_a_finished_run_that_its_records_lost_is_told_again(
    uninterrupted, base_arguments, command, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    os.truncate(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 7)
    code, _, err = command([*base_arguments, f"output_dir={run}"])
    assert code == 0, err
    assert_same_run(run, uninterrupted)
    assert [r["status"] for r in read_records(run / "metrics.jsonl") if r["event"] == "run_finished"] == ["finished"]


def test_a_flipped_bit_in_a_large_file(base_arguments, command, tmp_path):
    """The quick look does not see it. In full the file is named: a run resumes from the checkpoint before, and nothing
    starts from its weights."""
    run = tmp_path / "run"
    larger = ["model=scratch", "model.overrides.hidden_size=128", "model.overrides.intermediate_size=512"]
    arguments = [*base_arguments, f"output_dir={run}", *larger, "max_steps=10"]
    code, _, err = command(arguments)
    assert code == 0, err
    newest = run / "checkpoints/step-00000010"
    weights = newest / "model.safetensors"
    written = weights.read_bytes()
    assert len(written) > 1 << 20
    damaged = bytearray(written)
    damaged[len(written) // 2] ^= 1
    weights.write_bytes(damaged)
    export = ["task=export", f"model_name={newest}"]
    assert command([*export, f"output_dir={tmp_path / 'quick'}"])[0] == 0
    code, _, err = command([*export, f"output_dir={tmp_path / 'full'}", "checkpoint.verify=full"])
    assert code == 2
    reason = "model.safetensors does not match its checksum"
    assert f"error: model_name={newest}: not a complete checkpoint: {reason}" in err
    assert weights_folder(str(run), key="model_name", verify="full") == str(run / "checkpoints/step-00000005")
    code, _, err = command([*arguments, "checkpoint.verify=full"])
    assert code == 0, err
    assert f"{newest} skipped: {reason}" in err
    assert weights.read_bytes() == written


@pytest.mark.slow
def test_torn_checkpoints_of_two_processes(base_arguments, spawn, tmp_path):
    """A missing shard, another version, a shard too many: each time the run ends as it was."""
    run, before, last = tmp_path / "run", "checkpoints/step-00000015", "checkpoints/step-00000020"
    arguments = [*base_arguments, "strategy=fsdp", "devices=2", "batch_size=1", f"output_dir={run}"]

    def goes_on(says):
        process = spawn([*arguments, "checkpoint.verify=full"])
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
        assert says in out

    goes_on("trains 20 steps")
    whole = shutil.copytree(run, tmp_path / "whole")

    (run / last / "model.rank-1.safetensors").unlink()
    goes_on(f"{run / last} skipped: model.rank-1.safetensors is missing")
    assert_same_run(run, whole)
    marker = run / last / "COMPLETE.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 99}))
    goes_on(f"{run / last} skipped: format 99, this version reads 3 to 4")
    assert_same_run(run, whole)
    shutil.rmtree(run / last)
    shutil.copy(run / before / "model.rank-1.safetensors", run / before / "model.rank-7.safetensors")
    goes_on("continues at step 15 of 20")
    assert_same_run(run, whole)


def test_resume_never_keeps_the_earlier_run_aside(uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    code, _, err = command([*base_arguments, f"output_dir={run}", "resume=never", "max_steps=3"])
    assert code == 0, err
    assert read_run_file(run)["steps"] == 3
    assert read_run_file(tmp_path / "run.old-1")["steps"] == 20


def test_a_second_run_in_the_same_folder_is_refused(base_arguments, command, spawn, tmp_path):
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}", "max_steps=100000", "save_every=null", "evaluate_every=null"]
    process = spawn(arguments)
    wait_for(run, 1, process)
    code, _, err = command(arguments)
    assert code == 2
    assert f"{process.pid}" in err


def test_a_live_run_is_not_moved_aside(base_arguments, command, spawn, tmp_path):
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}", "max_steps=100000", "save_every=null", "evaluate_every=null"]
    process = spawn(arguments)
    wait_for(run, 1, process)
    code, _, err = command([*arguments, "resume=never"])
    assert code == 2
    assert "another run is using it" in err
    assert not (tmp_path / "run.old-1").exists()


def test_a_checkpoint_of_another_run_in_a_folder_with_later_ones(uninterrupted, base_arguments, command, tmp_path):
    """The branch that was left is set aside, so that the new one is neither pruned nor passed over."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    named = uninterrupted / "checkpoints/step-00000015"
    code, _, err = command([*base_arguments, f"output_dir={run}", f"resume={named}", "save_every=1", "max_steps=17"])
    assert code == 0, err
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000016", "step-00000017"]


def test_an_evaluation_does_not_write_over_a_run(uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    code, _, err = command([*base_arguments, "task=evaluation", f"model_name={run / 'model'}", f"output_dir={run}"])
    assert code == 2
    assert "holds a pretraining run" in err
    assert_same_run(run, uninterrupted)


def test_from_a_named_checkpoint_elsewhere_all_that_lies_here_is_another_branch(
    uninterrupted, base_arguments, command, spawn, tmp_path
):
    """Killed before its first own save, the run resumes from the named one again, never from what lay here before."""
    run = tmp_path / "run"
    code, _, err = command([*base_arguments, f"output_dir={run}", "max_steps=5", "lr=5e-3"])
    assert code == 0, err
    named = uninterrupted / "checkpoints/step-00000015"
    arguments = [*base_arguments, f"output_dir={run}", f"resume={named}"]
    sink = "{_target_: tests.stopper.Stopper, event: train, at: 17, number: 9, resumed_too: true}"
    killed = spawn([*arguments, "allow_targets=[tests.stopper.Stopper]", f"+sink.stop={sink}"])
    out, _ = killed.communicate(timeout=60)
    assert killed.returncode == -9, out
    code, out, err = command(arguments)
    assert code == 0, err
    assert "continues at step 15 of 20" in out
    ours, theirs = (load(r / "checkpoints/step-00000020")["engine"]["model"] for r in (run, uninterrupted))
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in sorted(theirs.keys()))
