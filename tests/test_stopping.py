"""A stop signal is agreed by all ranks at the next safe point, wherever it comes: one checkpoint, exit code 75, and the same
command ends with the run that was not stopped."""

import json
import os
import sys
from pathlib import Path

import pytest

from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.preloaded import run_preloaded
from tests.runs import assert_same_numbers, assert_same_run, injected

PAIR = ["strategy=ddp", "devices=2", "batch_size=1"]


def stopping(event: str, step: int) -> list[str]:
    """A sink, which only rank 0 has: of several ranks one hears the signal."""
    return [
        "allow_targets=[tests.stopper.Stopper]",
        f"+sink.stop={{_target_: tests.stopper.Stopper, event: {event}, at: {step}}}",
    ]


@pytest.mark.parametrize(
    ("event", "step", "saved_at", "owes"),
    [
        ("train", 8, 8, True),  # an evaluation is due there: it is left to the resumed run
        pytest.param("train", 5, 5, False, marks=pytest.mark.slow),  # a save is due there: made once
        pytest.param("evaluation", 8, 9, False, marks=pytest.mark.slow),
        pytest.param("checkpoint", 10, None, None, marks=pytest.mark.slow),  # known whenever it has become whole
        # the last step: evaluation and export are owed
        pytest.param("train", 20, 20, True, marks=pytest.mark.slow),
    ],
)
def test_one_process(event, step, saved_at, owes, uninterrupted, base_arguments, spawn, tmp_path):
    run = tmp_path / "run"
    arguments = [*base_arguments, *stopping(event, step), f"output_dir={run}", "checkpoint.export=save"]
    process = spawn(arguments)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    facts = read_run_file(run)
    assert facts["status"] == "stopped"
    assert saved_at in (None, facts["steps"])
    state = json.loads((run / f"checkpoints/step-{facts['steps']:08d}/state.json").read_text())
    assert owes in (None, state["progress"]["pending_evaluation"])
    saves = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "checkpoint"]
    assert saves.count(facts["steps"]) == 1, "saved once"
    assert not (run / "model").exists()
    beside = run / f"models/step-{facts['steps']:08d}/model.safetensors"
    assert beside.exists() == (step != 20), "the last model is left to the resumed run"
    process = spawn(arguments)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert_same_run(run, uninterrupted)


AMID_STEPS = """
import os, signal
from pretrain.telemetry.interval import Interval
due = Interval.due
def signalled(self, step):
    if step == 6 and os.environ.get("RANK") == "{rank}":
        os.kill(os.getpid(), signal.{number})
    return due(self, step)
Interval.due = signalled
"""


FIRST_IMPORTS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "omegaconf":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


def test_ctrl_c_during_the_first_imports(base_arguments, spawn, tmp_path):
    process = spawn(
        [*base_arguments, f"output_dir={tmp_path / 'run'}"], env=injected(tmp_path, FIRST_IMPORTS), fresh=True
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert out == "stopped (Ctrl-C); the same command continues from here\n"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Where undisturbed runs of two processes lie, by their strategy."""
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture
def undisturbed_pair(pairs, base_arguments, command):
    def make(strategy="ddp"):
        run = pairs / strategy
        if not run.exists():
            code, _, err = command([*base_arguments, *PAIR, f"strategy={strategy}", f"output_dir={run}"])
            assert code == 0, err
        return run

    return make


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (1, "SIGUSR1"),
        pytest.param(1, "SIGTERM", marks=pytest.mark.slow),
        pytest.param(0, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_one_of_two_ranks(rank, number, base_arguments, undisturbed_pair, spawn, command, tmp_path):
    """It alone hears the signal, neither the other one nor the command."""
    run = tmp_path / "run"
    arguments = [*base_arguments, *PAIR, f"output_dir={run}"]
    process = spawn(arguments, env=injected(tmp_path, AMID_STEPS.format(rank=rank, number=number)))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert read_run_file(run)["steps"] in (6, 7), "rank 0 may be past its step 6"
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_numbers(run, undisturbed_pair())


def test_the_very_first_evaluation(base_arguments, spawn, tmp_path):
    """There is nothing to save yet; the same command starts anew."""
    run = tmp_path / "run"
    arguments = [*base_arguments, *stopping("run_started", 0), f"output_dir={run}"]
    process = spawn(arguments)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert not list((run / "checkpoints").glob("*"))
    process = spawn([*arguments, "sink.stop.at=-1"])
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"] == list(range(1, 21))


AMID_BATCHES = """
import os, signal
from pretrain.evaluation.perplexity import Evaluator
run, runs, batches = Evaluator.run, [], []
def signalled(self, engine, *, alive, **options):
    runs.append(1)
    def scored():
        alive()
        if len(runs) == 2:  # step 8: the first is that of step 0
            batches.append(1)
            if len(batches) == 2 and os.environ.get("RANK", "1") == "1":
                os.kill(os.getpid(), signal.SIGTERM)
    return run(self, engine, alive=scored, **options)
Evaluator.run = signalled
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], PAIR], ids=["single", "rank 1 of a pair"])
def test_amid_the_batches_of_an_evaluation(
    more, base_arguments, uninterrupted, undisturbed_pair, spawn, command, tmp_path
):
    run = tmp_path / "run"
    arguments = [*base_arguments, *more, f"output_dir={run}"]
    process = spawn(arguments, env=injected(tmp_path, AMID_BATCHES))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert read_run_file(run)["steps"] == 8
    assert {r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation"} == {0}
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_numbers(run, undisturbed_pair() if more else uninterrupted)


@pytest.mark.slow
def test_after_an_evaluation_that_was_owed(base_arguments, uninterrupted, spawn, command, tmp_path):
    """Its scores are saved in the place of the checkpoint without them; no step is trained."""
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}"]
    for event in (stopping("train", 8), [*stopping("evaluation", 8), "+sink.stop.resumed_too=true"]):
        process = spawn([*arguments, *event])
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 75, out
    state = json.loads((run / "checkpoints/step-00000008/state.json").read_text())
    assert not state["progress"]["pending_evaluation"]
    saves = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "checkpoint"]
    assert saves[-1] == 8, "and told of"
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_run(run, uninterrupted)


AMID_SAMPLES = """
import os, signal
from pretrain.evaluation.samples import Sampler
from pretrain.cli.main import program
going_on, rounds = Sampler._continue, []
def signalled(*given):
    rounds.append(1)
    if len(rounds) == 2:  # step 8: the first are those of step 0
        os.kill(os.getpid(), signal.SIGTERM)
    return going_on(*given)
Sampler._continue = signalled
program()
"""


@pytest.mark.slow
def test_amid_samples(uninterrupted, base_arguments, command, tmp_path):
    """The domains are scored, the samples cut short: nothing of the evaluation is told, and all of it is owed."""
    run = tmp_path / "run"
    arguments = [*base_arguments, f"output_dir={run}"]
    done = run_preloaded(["-c", AMID_SAMPLES, *arguments])
    assert done.returncode == 75, done.stderr
    assert read_run_file(run)["steps"] == 8
    assert {r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] in ("evaluation", "sample")} == {0}
    code, _, err = command(arguments)
    assert code == 0, err
    assert_same_run(run, uninterrupted)


IMPORT = """
import os, signal, sys, types
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy" and not hasattr(self, "done"):
            self.done = True
            os.kill(os.getpid(), signal.SIGTERM)
            sys.path_importer_cache.clear()
sys.meta_path.insert(0, Finder())
"""


def test_in_the_middle_of_an_import(base_arguments, spawn, tmp_path):
    """An import that is left half way can't be made again: the signal waits for its end."""
    (tmp_path / "sitecustomize.py").write_text(IMPORT)
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"
    process = spawn(
        [*base_arguments, f"output_dir={tmp_path / 'run'}"], env=os.environ | {"PYTHONPATH": path}, fresh=True
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "stopped (SIGTERM)" in out
    assert "Traceback" not in out


COMPILER = """#!{python} -SE
import os, signal, sys
from contextlib import suppress
if "--version" in sys.argv and "evaluation" in open("{run}/metrics.jsonl").read():
    with suppress(FileExistsError):
        os.mkdir("{run}.signalled")
        os.{kill}({pid}, signal.{number})
os.execvp("g++", ["g++", *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "number"), [("kill", "SIGTERM"), ("killpg", "SIGTERM"), ("killpg", "SIGINT")])
def test_while_compiling(kill, number, base_arguments, spawn, tmp_path):
    """The compiler that the first step starts sends it: to the run, or as a terminal to all that belongs to it. It is asked
    for its version first, and one that does not answer is none."""
    whole, run, compiler = tmp_path / "whole", tmp_path / "run", tmp_path / "g++"
    arguments = [*base_arguments, "model.compile=true", "max_steps=6", "evaluation.samples=0"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"), "CXX": str(compiler)}
    process = spawn([*arguments, f"output_dir={run}"], env=environment, start_new_session=True)
    compiler.write_text(COMPILER.format(python=sys.executable, run=run, kill=kill, pid=process.pid, number=number))
    compiler.chmod(0o755)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert "Traceback" not in out
    assert read_run_file(run)["steps"] == 1
    environment["CXX"] = "g++"
    for folder in (run, whole):
        process = spawn([*arguments, f"output_dir={folder}"], env=environment)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    assert_same_numbers(run, whole)
