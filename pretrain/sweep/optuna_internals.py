"""What this program uses of Optuna's private parts (seen in Optuna 5.0.0). ``tests/test_internals.py`` fails when one of them
has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

CREATE_TRIAL = 4  # the op_code of an entry in a journal that creates a trial: JournalOperation.CREATE_TRIAL


def open_trial(study: Study, trial: FrozenTrial) -> Trial:
    """Return the trial of ``study`` that ``trial`` is a copy of. Optuna has no public way to resume a running trial."""
    from optuna.trial import Trial

    return Trial(study, trial._trial_id)
