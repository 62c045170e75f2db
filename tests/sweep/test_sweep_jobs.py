"""What a job is called, how it is known again, and who is at work on it."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config.compose import forced
from pretrain.config.quoting import quoted_word
from pretrain.runtime.errors import UserError
from pretrain.sweep.command import _codes, _failures, worst
from pretrain.sweep.job import LONGEST_NAME, digest, job_of, jobs_in, readable_name
from pretrain.sweep.jobs import Sweep, quoted, run_job

KEYS = ("lr", "strategy", "dataset.nameOrPath")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["lr=0.001", "max_steps=3", "strategy=ddp"], "lr=0.001,strategy=ddp"),
        (["dataset.nameOrPath='/a b/c'"], "dataset.nameOrPath=_a_b_c"),
        (["dataset.nameOrPath=../../x"], "dataset.nameOrPath=.._.._x"),
        (["max_steps=3"], "job"),
    ],
)
def test_names_say_what_is_swept_and_are_safe(overrides, name):
    assert readable_name(overrides, KEYS) == name


def test_long_names_are_cut_and_stay_apart():
    one, two = (readable_name([f"dataset.nameOrPath={'x' * 300}{end}"], KEYS) for end in "ab")
    assert len(one) == len(two) == LONGEST_NAME
    assert one != two


def test_a_job_is_known_by_its_overrides_in_any_order(tmp_path):
    job = job_of(tmp_path, ["++lr=0.001", "strategy=ddp", "sweep_dir=x", "sweep.metric=forgetting"], ("lr",))
    assert job.overrides == ("lr=0.001", "strategy=ddp")
    grown = job_of(tmp_path, ["strategy=ddp", "lr=0.001"], ("lr", "strategy"))
    assert grown == replace(job, overrides=grown.overrides)
    assert grown.folder == tmp_path / "lr=0.001"


def test_other_jobs_of_the_same_name_have_other_folders(tmp_path):
    short, long = (job_of(tmp_path, ["lr=0.001", f"max_steps={n}"], ("lr",)) for n in (1, 2))
    slash, dash = (job_of(tmp_path, [f"dataset.nameOrPath=a{c}b"], KEYS) for c in "/_")
    assert len({short.folder, long.folder, slash.folder, dash.folder}) == 4
    assert [job for job, _ in jobs_in(tmp_path)] == [short, long, slash, dash]


def test_no_job_is_written_through_a_link(tmp_path):
    """A sweep folder may have come with somebody else's files."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("lr=1", "lr=2", f"lr=2-{digest(['lr=2'])}"):
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep" / name).symlink_to(tmp_path / "elsewhere")
    assert job_of(tmp_path / "sweep", ["lr=1"], ("lr",)).name == f"lr=1-{digest(['lr=1'])}"
    with pytest.raises(UserError, match=r"lr=2-\w+ in it is a link to .*elsewhere; nothing is written through a link"):
        job_of(tmp_path / "sweep", ["lr=2"], ("lr",))
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        *("[]", "1", "", '{"name": "lr=1"', "[" * 100_000, '{"name": "lr=1"}'),
        *(
            {"overrides": 3},
            {"overrides": [1]},
            {"created": "now"},
            {"created": math.nan},
            {"seconds": None},
            {"status": 5},
        ),
    ],
    ids=lambda damage: str(damage)[:20],
)
def test_a_damaged_job_is_left_out_and_kept_as_it_is(damage, tmp_path, capsys):
    job, other = (job_of(tmp_path, [f"lr={n}"], ("lr",)) for n in (1, 2))
    file = job.folder / "job.json"
    found = damage if isinstance(damage, str) else json.dumps(json.loads(file.read_text()) | damage)
    file.write_text(found)
    assert [left for left, _ in jobs_in(tmp_path)] == [other]
    assert [left for left, _ in jobs_in(tmp_path)] == [other]
    assert capsys.readouterr().err == f"{file}: not a valid job state; the job is ignored\n"
    assert job_of(tmp_path, ["lr=1"], ("lr",)).name == f"lr=1-{digest(['lr=1'])}"
    assert file.read_text() == found


def test_a_run_that_was_moved_aside_is_no_job(tmp_path):
    job = job_of(tmp_path, ["lr=1"], ("lr",))
    job.folder.rename(tmp_path / "lr=1.old-1")
    assert jobs_in(tmp_path) == []


def test_a_job_is_held_by_one_command_and_by_the_child_it_leaves(tmp_path):
    job = job_of(tmp_path, ["lr=1"], ("lr",))
    with job.exclusive() as held:
        assert job.lock() is None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=held.descriptors)
    assert job.lock() is None, "the one who started it is gone, but it is still at work"
    child.communicate(b"\n")
    free = job.lock()
    assert free is not None
    free.release()


def sweep_in(folder, **changes):
    fields = {"keys": ("lr",), "metric": "new_loss", "direction": "minimize", "command": ("-m", "lr=1,2")}
    return Sweep(folder, began_at=1.0, **fields | changes)


def test_the_words_of_a_job_name_its_folder_and_the_config_dir(tmp_path):
    sweep = sweep_in(tmp_path / "it's", config_dir="/conf")
    job = sweep.job(["++lr=0.001"])
    folder = str(tmp_path / "it\\'s" / "lr=0.001")
    assert sweep.arguments(job) == ["--config-dir", "/conf", "lr=0.001", f"output_dir='{folder}'"]
    assert sweep.arguments(sweep.job(["lr=0.1", "output_dir=there"]))[-1] == "output_dir=there"


def test_quoted_paths_come_back_from_hydras_grammar():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    path = Path("/a b/it's/x,y=[1]/\\{z}")
    [override] = OverridesParser.create().parse_overrides([f"output_dir={quoted(path)}"])
    assert override.value() == str(path)


def test_the_command_that_continues_names_the_folder():
    assert sweep_in(Path("multirun/now")).command_line == "python -m pretrain -m lr=1,2 sweep_dir=multirun/now"
    said = sweep_in(Path("mine"), command=("-m", "lr=1,2", "sweep_dir=mine")).command_line
    assert said == "python -m pretrain -m lr=1,2 sweep_dir=mine"


def test_what_a_process_leaves_is_written_down(tmp_path):
    sweep = sweep_in(tmp_path)
    for code, status in ((0, "finished"), (75, "stopped"), (2, "failed"), (1, "failed"), (137, "failed")):
        job = sweep.job([f"lr={code}"])
        state = sweep.begin(job)
        outcome = sweep.end(job, state, code, 2.0)
        assert (outcome.status, outcome.exit_code, outcome.objective) == (status, code, None)
    assert job.read()["error"] == "killed by SIGKILL: out of memory?"
    again = sweep.begin(job)
    assert (again["status"], again["error"], again["seconds"]) == ("waiting", None, 2.0)
    assert sweep.end(job, again, 0, 3.0).status == "finished"
    assert job.read()["seconds"] == 5.0


def test_a_stopped_job_that_was_to_be_pruned_is_pruned_and_stays_so(tmp_path):
    sweep = sweep_in(tmp_path)
    job = sweep.job(["lr=1"])
    state = sweep.begin(job)
    job.prune_file.touch()
    assert sweep.end(job, state, 75, 1.0).status == "pruned"
    assert sweep.begin(job)["status"] == "pruned"


def test_what_an_earlier_attempt_left_is_not_the_next_ones(tmp_path):
    """Whatever launcher begins it: nothing else takes it away under SLURM."""
    sweep = sweep_in(tmp_path)
    job = sweep.job(["lr=1"])
    job.prune_file.touch()
    job.error_file.write_text("error: an old one")
    assert sweep.end(job, sweep.begin(job), 75, 1.0).status == "stopped"
    assert sweep.end(job, sweep.begin(job), 3, 1.0).status == "failed"
    assert job.read()["error"] == "exit code 3"


def test_whether_every_job_failed_is_asked_of_this_commands_jobs(fabricate, tmp_path):
    fabricate("lr=9", new=(4.0, -1.0))  # an earlier command's, which is no longer in this one
    sweep = sweep_in(tmp_path / "sweep")
    for code in (2, 1):
        job = sweep.job([f"lr={code}"])
        sweep.end(job, sweep.begin(job), code, 1.0)
    assert [state["exit_code"] for state in _failures(sweep)] == [2, 1]
    assert worst(_codes(sweep)) == 1
    good = sweep.job(["lr=3"])
    sweep.end(good, sweep.begin(good), 0, 1.0)
    assert _failures(sweep) == []


def test_finished_jobs_are_not_run_again(fabricate, tmp_path):
    """No process is started: the model it would need is nowhere."""
    job = fabricate("lr=1", "model_name=/nowhere", new=(4.0, -1.0))
    outcome = run_job(sweep_in(tmp_path / "sweep"), ["model_name=/nowhere", "lr=1"])
    assert (outcome.job.name, outcome.status, outcome.objective) == (job.name, "finished", 4.0)


@pytest.mark.parametrize(
    ("typed", "folder"), [("runs/книги", "runs/книги"), ("it's", "it's"), ("'a, b'", "a, b"), ("plain/x", "plain/x")]
)
def test_a_job_in_a_folder_of_any_name(typed, folder, tmp_path):
    job = job_of(tmp_path, [forced(quoted_word(f"output_dir={typed}", sweeping=True))], ("lr",))
    assert job.folder == Path(folder)
