"""hydra/sweeper=optuna: the words of the search space, a study that is resumed, and bad trials pruned."""

import json
import math
import os
import statistics
import time
from contextlib import suppress

import pytest
from hydra.core.utils import JobReturn, JobStatus

pytest.importorskip("optuna")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pretrain.config.check import check_options
from pretrain.runtime.errors import UserError
from pretrain.runtime.signals import Stopped
from pretrain.sweep.jobs import Sweep
from pretrain.sweep.measure import objectives
from pretrain.sweep.optuna_sweeper import Options, OptunaSweeper
from pretrain.sweep.pruning import evaluated_since, pruning
from pretrain.sweep.space import parse_space
from pretrain.sweep.study import Study, search_lock

LR = "lr=tag(log,interval(1e-5,1e-1))"


@pytest.mark.parametrize(
    ("word", "distribution"),
    [
        ("lr=interval(1e-5,1e-2)", FloatDistribution(1e-5, 1e-2)),
        ("lr=tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("x=int(interval(1,64))", IntDistribution(1, 64)),
        ("x=range(8,65,8)", IntDistribution(8, 64, step=8)),
        ("x=range(4,0,-1)", IntDistribution(1, 4)),
        ("x=tag(log,range(1,9))", IntDistribution(1, 8, log=True)),
        ("x=range(0,1,step=0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("strategy=ddp,fsdp", CategoricalDistribution(["ddp", "fsdp"])),
        ("x=choice(1,'a b')", CategoricalDistribution(["1", "a\\ b"])),
        ("sink=[console,jsonl],jsonl", CategoricalDistribution(["[console,jsonl]", "jsonl"])),
    ],
)
def test_the_words_of_the_search_space(word, distribution):
    space = parse_space([word, "seed=1"], None)
    assert list(space.searched.values()) == [distribution]
    assert space.fixed == ["seed=1"]


def test_an_argument_wins_over_the_experiments_params():
    space = parse_space(["lr=1e-4,1e-3", "seed=1,2", "++lr=interval(1,2)", "++seed=3"], None)
    assert space.searched == {"lr": FloatDistribution(1.0, 2.0)}
    assert space.overrides({"lr": 1.23456789}) == ["++seed=3", "++lr=1.23457"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["lr=1e-3"], "nothing to search"),
        (["lr=interval(2,1)"], "lr=interval(2,1): `low <= high` must hold"),
        (["lr=tag(log,interval(0,1))"], "`low > 0` must hold"),
        (["x=range(3,3)"], "x=range(3,3): there is no number in this range"),
    ],
)
def test_a_mistake_in_the_search_space(words, reason):
    with pytest.raises(UserError, match=reason.replace("(", r"\(").replace(")", r"\)")):
        parse_space(words, None)


class Fabricator:
    """A launcher whose jobs are made up: the loss is smallest at lr=1e-3. ``fate(n)`` may end the n-th of them otherwise."""

    def __init__(self, sweep, fate=lambda number: "finished"):
        self.sweep, self.fate, self.launched = sweep, fate, []

    def launch(self, job_overrides, initial_job_idx):
        returns = []
        for overrides in job_overrides:
            job = self.sweep.job(list(overrides))
            state = self.sweep.begin(job)
            self.launched.append(job.name)
            fate = self.fate(len(self.launched))
            if fate == "killed":
                raise KeyboardInterrupt
            lr = float(job.overrides[-1].partition("=")[2])
            results = {"books": {"role": "new", "loss": abs(math.log10(lr) + 3), "delta_loss": 0.0}}
            (job.folder / "run.json").write_text(json.dumps({"results": results}))
            outcome = self.sweep.end(job, state, {"finished": 0, "failed": 1, "stopped": 75}[fate], 1.0)
            if fate == "stopped":
                raise Stopped("SIGTERM")
            returns.append(JobReturn(status=JobStatus.COMPLETED, _return_value=outcome.objective))
        return returns


@pytest.fixture
def search(tmp_path):
    """``search(n_trials, words, fate) -> names of the jobs launched``, by the real sweeper in one folder."""

    def run(
        n_trials, words=(LR,), fate=lambda number: "finished", n_jobs=1, metric="new_loss", direction="minimize", seed=0
    ):
        options = {"n_trials": n_trials, "n_jobs": n_jobs, "startup_trials": 3, "prune": True, "seed": seed}
        sweeper = OptunaSweeper(params=None, **options)
        sweep = Sweep(tmp_path / "sweep", ("lr",), metric, direction, ("-m",), time.time())
        sweeper.space = parse_space(["seed=1", *words], None)
        sweeper.jobs, sweeper.at_once, sweeper.starter = sweep, n_jobs, Fabricator(sweep, fate)
        with suppress(Stopped, KeyboardInterrupt):
            sweeper.sweep(["seed=1", *words])
        return sweeper.starter.launched

    return run


def states(folder):
    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / "sweep/optuna.journal"))
    )
    return [trial.state.name for trial in optuna.load_study(study_name="sweep", storage=storage).trials]


def test_a_search_finds_what_is_good(search):
    names = search(40)
    found = [abs(math.log10(float(name.partition("=")[2])) + 3) for name in names]
    assert len(names) == 40
    assert statistics.median(found[20:]) < 0.6, "chance comes to 1"


@pytest.mark.parametrize("fate", ["stopped", "killed"])
def test_the_same_command_goes_on(fate, search, tmp_path):
    first = search(6, fate=lambda number: fate if number == 3 else "finished")
    assert len(first) == 3
    assert states(tmp_path) == ["COMPLETE", "COMPLETE", "RUNNING"]
    second = search(6)
    assert second[0] == first[2], "the interrupted one first"
    assert len(second) == 4
    assert not set(second) & set(first[:2]), "what is finished is not run again, nor drawn again"
    assert states(tmp_path) == ["COMPLETE"] * 6
    assert search(6) == []
    assert len(search(8)) == 2, "a larger number continues"


def drawn(folder, seed, count, start=0):
    """The learning rates that a study draws for trials ``start`` … ``start + count``, all of them worse than the last."""
    study = Study(folder, space=parse_space([LR], None), metric="m", direction="minimize", startup_trials=99, seed=seed)
    rates = []
    for number in range(start, start + count):
        trial = study.next()
        rates.append(trial.params["lr"])
        study._study.tell(trial, float(number))
    return rates


def test_the_seed_decides_what_is_drawn_and_a_resumed_study_draws_something_else(tmp_path):
    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
    first = drawn(tmp_path / "one", 7, 3)
    assert drawn(tmp_path / "same", 7, 3) == first
    assert not set(drawn(tmp_path / "other", 8, 3)) & set(first)
    more = drawn(tmp_path / "one", 7, 3, start=3)
    assert len(set(first + more)) == 6, "a random state that starts again draws the same again"
    assert drawn(tmp_path / "same", 7, 3, start=3) == more


def test_the_sweeper_s_seed_is_that_of_the_study(search, tmp_path):
    first = search(2, seed=3)
    (tmp_path / "sweep").rename(tmp_path / "first")
    assert not set(search(2, seed=4)) & set(first)
    (tmp_path / "sweep").rename(tmp_path / "second")
    assert search(2, seed=3) == first


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1e-3), ("maximize", 1e-5)])
def test_the_search_goes_in_the_direction_of_the_sweep(direction, best, search, tmp_path):
    """The loss is smallest at 1e-3 and largest, with 2, at both ends."""
    names = search(30, direction=direction)
    far = [abs(math.log10(float(name.partition("=")[2])) + 3) for name in names]
    wanted = abs(math.log10(best) + 3)
    assert statistics.median(abs(f - wanted) for f in far[20:]) < 0.6, "chance comes to 1"
    import optuna

    file = optuna.storages.journal.JournalFileBackend(str(tmp_path / "sweep/optuna.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(file))
    assert study.best_value == (min(far) if direction == "minimize" else max(far))


def test_trials_side_by_side_differ_and_each_is_resumed(search, tmp_path):
    first = search(4, n_jobs=2, fate=lambda number: "killed" if number == 4 else "finished")
    assert len(set(first)) == 4
    assert states(tmp_path) == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    assert search(4, n_jobs=2) == first[2:]


def test_a_failed_trial_counts_once_and_is_tried_again_by_the_next_command(search, tmp_path):
    first = search(4, fate=lambda number: "failed" if number == 2 else "finished")
    assert len(first) == 4
    assert states(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert search(4) == [first[1]]
    assert search(4) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"words": (LR, "max_steps=7")}, "with less, not max_steps=7"),
        ({"words": ("lr=interval(1e-5,1e-1)",)}, "of searched"),
        ({"metric": "forgetting"}, "of metric new_loss, not forgetting"),
    ],
)
def test_another_search_needs_another_folder(changed, reason, search):
    search(1)
    with pytest.raises(UserError, match=f"contains another search, {reason}"):
        search(2, **changed)


def test_a_line_that_was_torn_by_a_power_failure_is_passed_over(search, tmp_path):
    search(2)
    with (tmp_path / "sweep/optuna.journal").open("a") as journal:
        journal.write('{"op_code":4,"worker')
    assert len(search(3)) == 1
    assert states(tmp_path) == ["COMPLETE"] * 3


def test_a_broken_line_in_the_journal_loses_no_later_trial(search, tmp_path, capsys):
    search(2)
    file = tmp_path / "sweep/optuna.journal"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], b'{"op_c\n', b"\0\0\n", *lines[3:]]))
    spoilt = file.read_bytes()
    assert len(search(3)) == 1
    assert states(tmp_path) == ["COMPLETE"] * 3
    assert (tmp_path / "sweep/optuna.journal.broken").read_bytes() == spoilt
    assert f"{file}:4: not an entry of a search" in capsys.readouterr().err


def test_a_journal_that_makes_no_sense_without_a_line_is_kept(search, tmp_path):
    """Trials are numbered by their beginnings: without one the next would take its results."""
    search(2)
    file = tmp_path / "sweep/optuna.journal"
    lines = file.read_text().splitlines(keepends=True)
    begun = next(i for i, line in enumerate(lines) if '"op_code":4' in line)
    lines[begun] = "3\n"
    file.write_text("".join(lines))
    with pytest.raises(
        UserError, match=rf"optuna.journal:{begun + 1}: not an entry .* restore the file, or move it away"
    ):
        search(3)
    assert file.read_text() == "".join(lines)


@pytest.mark.parametrize("planted", [{"allow_targets": "[foreign]"}, {"strategy": "single,x"}, {"lr": 5.0}])
def test_a_planted_trial_is_no_job(planted, tmp_path):
    """What is in a trial becomes a command line; the journal may have come with somebody else's folder."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    space = parse_space([LR, "strategy=single,ddp"], None)
    told = {"space": space, "metric": "forgetting", "direction": "minimize", "startup_trials": 1, "seed": 0}
    Study(tmp_path, **told)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "optuna.journal")))
    optuna.load_study(study_name="sweep", storage=storage).enqueue_trial({"lr": 1e-3, "strategy": "ddp"})
    assert Study(tmp_path, **told).next().params == {"lr": 1e-3, "strategy": "ddp"}
    optuna.load_study(study_name="sweep", storage=storage).enqueue_trial(planted)
    with pytest.raises(UserError, match=r"optuna\.journal: trial 1 has keys or values that are not in this search"):
        Study(tmp_path, **told)


def test_only_one_command_searches(search, tmp_path):
    with search_lock(tmp_path / "sweep"), pytest.raises(UserError, match="another command is searching"):
        search(1)
    assert len(search(1)) == 1


@pytest.mark.parametrize("options", [{"n_trials": 0}, {"n_jobs": 0}, {"seed": -1}, {"startup_trials": 1.5}])
def test_options_are_checked(options):
    good = {"n_trials": 1, "n_jobs": None, "startup_trials": 1, "prune": True, "seed": 0}
    check_options("hydra.sweeper", Options(**good))
    with pytest.raises(UserError, match=f"hydra.sweeper.{next(iter(options))}="):
        check_options("hydra.sweeper", Options(**good | options))


def evaluated(job, losses):
    """Evaluations of two domains at steps 0, 10, 20, …; the last one is still being made."""
    records = [
        {"event": "evaluation", "step": 10 * i, "domain": domain, "role": role, "loss": loss, "delta_loss": loss - 9}
        for i, loss in enumerate(losses)
        for domain, role in (("books", "new"), ("old", "base"))
    ]
    job.folder.mkdir(exist_ok=True)
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:-1]) + '{"event": "eval')
    (job.folder / "run.json").write_text("{}")


def test_objectives_of_whole_evaluations(tmp_path):
    job = Sweep(tmp_path, ("lr",), "new_loss", "minimize", (), 0.0).job(["lr=1"])
    evaluated(job, [9.0, 5.0, 4.0, 3.0])
    assert objectives(job.folder, "new_loss") == {10: 5.0, 20: 4.0}
    assert objectives(job.folder, "forgetting") == {10: -4.0, 20: -5.0}
    assert objectives(job.folder, "old.loss") == {10: 5.0, 20: 4.0}
    assert objectives(job.folder, "tokens_per_second") == {}
    assert objectives(tmp_path / "nowhere", "new_loss") == {}


def test_a_long_metrics_file_is_read_after_evaluations_only(tmp_path):
    job = Sweep(tmp_path, ("lr",), "new_loss", "minimize", (), 0.0).job(["lr=1"])
    seen = {}
    assert not evaluated_since(job, seen), "it has not begun"
    evaluated(job, [9.0, 5.0])
    assert evaluated_since(job, seen)
    with (job.folder / "metrics.jsonl").open("a") as metrics:
        metrics.write("\n")
    assert not evaluated_since(job, seen)
    os.utime(job.folder / "run.json", ns=(1, 1))
    assert evaluated_since(job, seen)


def test_a_trial_worse_than_the_median_is_asked_to_stop(tmp_path, capsys):
    (tmp_path / "sweep").mkdir()
    sweep = Sweep(tmp_path / "sweep", ("lr",), "new_loss", "minimize", (), 0.0)
    space = parse_space([LR], None)
    study = Study(sweep.folder, space=space, metric="new_loss", direction="minimize", startup_trials=1, seed=0)

    def trial_of(losses):
        trial = study.next()
        job = sweep.job(space.overrides(trial.params))
        sweep.begin(job)
        evaluated(job, losses)
        job.write(status="running", locked=True)
        return job, trial

    def watch(*pairs, until):
        with pruning(dict(pairs), "new_loss"):
            deadline = time.monotonic() + 30
            while not until() and time.monotonic() < deadline:
                time.sleep(0.05)

    earlier, good, bad = (trial_of([9.0, loss, 1.0]) for loss in (5.0, 4.0, 6.0))
    watch(earlier, until=lambda: study._study.trials[0].intermediate_values)
    (earlier[0].folder / "run.json").write_text(json.dumps({"results": {"books": {"role": "new", "loss": 1.0}}}))
    study.tell(earlier[1], sweep.end(earlier[0], earlier[0].read(), 0, 1.0))
    watch(good, bad, until=bad[0].prune_file.exists)
    assert bad[0].prune_file.exists()
    assert not good[0].prune_file.exists()
    assert f"{bad[0].name}: worse than the median at step 10; pruned" in capsys.readouterr().err
    study.tell(bad[1], sweep.end(bad[0], bad[0].read(), 75, 1.0))
    assert states(tmp_path) == ["COMPLETE", "RUNNING", "PRUNED"]
