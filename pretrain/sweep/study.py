"""The study of a search, stored as Optuna's journal in the sweep's folder. The journal has all trials and their results, so
that the same command resumes the search after it was stopped or killed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import keep_copy, replace_file
from pretrain.runtime.lines import json_lines
from pretrain.sweep.job import lock_of, plain
from pretrain.sweep.jobs import Outcome
from pretrain.sweep.optuna_internals import CREATE_TRIAL, open_trial
from pretrain.sweep.space import Space

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.trial import FrozenTrial, Trial

FILE = "optuna.journal"


@contextmanager
def search_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's search lock, so that only one command searches in it. A second command could not distinguish the open
    trials of the first from those of a killed one.

    Raises ``UserError`` if another command holds the lock.
    """
    held = lock_of(folder, "search.lock", wait=False)
    if held is None:
        raise UserError(f"sweep_dir={folder}: another command is searching in it")
    try:
        yield
    finally:
        held.release()


class Study:
    """A study that chooses trials with the tree-structured Parzen estimator (Bergstra et al. 2011) and prunes those that are
    worse than the median of the other trials (Golovin et al. 2017).

    Raises ``UserError`` if ``folder`` contains a different search, or if Optuna is missing."""

    def __init__(
        self, folder: Path, *, space: Space, metric: str, direction: str, startup_trials: int, seed: int
    ) -> None:
        optuna = _optuna()
        self._space = space
        self._open: list[Trial] = []  # trials of a command that was stopped
        _remove_invalid_lines(folder / FILE)
        self._study: OptunaStudy = optuna.create_study(
            study_name="sweep",
            storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / FILE))),
            direction=direction,
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=startup_trials),
        )
        # Each start uses another seed, because the same seed would draw the same trials again.
        seed += len(self._study.trials)
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=startup_trials, seed=seed, constant_liar=True)
        searched = {key: optuna.distributions.distribution_to_json(d) for key, d in space.searched.items()}
        about = {"searched": searched, "fixed": sorted(plain(space.fixed)), "metric": metric, "direction": direction}
        known = self._study.user_attrs.get("about")
        if known is None:
            self._study.set_user_attr("about", about)
        elif known != about:
            raise UserError(
                f"sweep_dir={folder} contains another search, {_difference(known, about)}; use another folder"
            )

        for trial in self._study.trials:
            if not space.holds(_params(trial)):
                raise UserError(f"{folder / FILE}: trial {trial.number} has keys or values that are not in this search")

    def resume(self) -> int:
        """Resume the open trials and queue the failed ones again. Return the number of trials that have a result."""
        from optuna.trial import TrialState

        trials = self._study.trials
        self._open = [open_trial(self._study, t) for t in trials if t.state == TrialState.RUNNING]
        others = [_params(t) for t in trials if t.state != TrialState.FAIL]
        for trial in trials:
            if trial.state == TrialState.FAIL and trial.params not in others:
                self._study.enqueue_trial(trial.params)
                others.append(trial.params)
        return sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)

    def next(self) -> Trial:
        """Return an open trial if there is one, else one that the study chooses."""
        return self._open.pop(0) if self._open else self._study.ask(self._space.searched)

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """Report the result of a trial to the study. A trial that was stopped stays open."""
        from optuna.trial import TrialState

        if outcome.status == "finished" and outcome.objective is not None:
            self._study.tell(trial, outcome.objective)
        elif outcome.status == "pruned":
            self._study.tell(trial, state=TrialState.PRUNED)
        elif outcome.status in ("finished", "failed"):
            self._study.tell(trial, state=TrialState.FAIL)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("hydra/sweeper=optuna needs optuna: pip install 'pretrain[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters of a trial, also of one that is queued to be tried again."""
    params: dict[str, Any] = trial.system_attrs.get("fixed_params", trial.params)
    return params


def _remove_invalid_lines(file: Path) -> None:
    """Remove invalid lines from the journal. Optuna reads its journal only up to the first line that is not JSON and appends
    after an incomplete last line, so that all later trials would be lost. If any but the last line is removed, a copy of the
    file is kept.

    Raises ``UserError`` if the remaining entries are inconsistent."""
    if not file.exists():
        return
    before = file.read_bytes()
    lines = before.splitlines(keepends=True)
    invalid: list[int] = []
    found = [(number, entry) for number, entry in json_lines(lines, on_invalid=invalid.append)]
    invalid += [number for number, entry in found if not isinstance(entry, dict)]
    entries = {number: entry for number, entry in found if isinstance(entry, dict)}
    if invalid:
        where = f"{file}:{min(invalid)}: not an entry of a search"
        if not _is_consistent(entries.values()):
            raise UserError(
                f"{where}, and later entries are inconsistent without it; restore the file, or move it away"
            )
        keep_copy(file)
        notice(f"{where}; it is skipped, later entries are read")
    after = b"".join(lines[number - 1].rstrip(b"\r\n") + b"\n" for number in entries)
    if after != before:
        replace_file(file, after)


def _is_consistent(entries: Iterable[dict[str, Any]]) -> bool:
    """Return whether every entry belongs to a trial that was created before it. Trials are numbered in order of creation."""
    begun = 0
    for entry in entries:
        begun += entry.get("op_code") == CREATE_TRIAL
        if entry.get("trial_id", -1) >= begun:
            return False
    return True


def _difference(known: dict[str, Any], about: dict[str, Any]) -> str:
    """Return the first difference between two searches, such as ``of metric new_loss, not forgetting``."""
    if known["fixed"] != about["fixed"]:
        was, now = (sorted(set(a["fixed"]) - set(b["fixed"])) for a, b in ((known, about), (about, known)))
        return f"with {' '.join(was) or 'less'}, not {' '.join(now) or 'less'}"
    key = next(key for key in about if known[key] != about[key])
    return f"of {key} {known[key]}, not {about[key]}"
