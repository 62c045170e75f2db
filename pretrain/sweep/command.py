"""`python -m pretrain -m …`: plan a sweep, check its jobs, run them, and report the results."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from pretrain.config.check import check_part, conf_dir
from pretrain.config.hydra_configs import compose_config, composing
from pretrain.config.hydra_internals import Callbacks, Hydra
from pretrain.config.schema import build_part
from pretrain.config.trust import PARTS
from pretrain.runtime.console import complain, notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import make_folder, open_file, own_folder
from pretrain.runtime.folders import check_links, check_private
from pretrain.runtime.signals import EXIT_CODE, Interrupt, Stopped
from pretrain.runtime.streams import flush, make_nonblocking
from pretrain.sweep import table
from pretrain.sweep.config import SweepConfig
from pretrain.sweep.job import INTERNAL_FOLDER, jobs_in
from pretrain.sweep.jobs import Sweep, quoted
from pretrain.sweep.plan import Plan
from pretrain.sweep.show import show


def sweep(arguments: list[str], config_dir: str | None, overrides: list[str], cli_values: dict[str, Any]) -> int:
    """Run a sweep and return its exit code, the worst of its jobs'.

    ``arguments`` are those of the command line; ``config_dir`` and ``overrides`` are what Hydra gets. For ``cli_values`` see
    `trust.command_line_only_values`.

    Raises ``UserError`` for a mistake in any job, before the first one starts.
    """
    with composing(conf_dir(), config_dir) as hydra:
        config = compose_config(hydra, [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        plan = Plan(hydra.config_loader, config, config_dir)
        plan.check(cli_values)
        folder = Path(os.path.expanduser(config.sweep_dir or config.hydra.sweep.dir))
        check_part("sweep", OmegaConf.to_container(config.sweep, resolve=True), PARTS["sweep"], [])
        policy: SweepConfig = build_part(dict(config.sweep))
        this = Sweep(
            folder=folder,
            keys=plan.keys,
            metric=policy.metric,
            direction=policy.direction,
            command=_with_multirun(arguments),
            began_at=time.time(),
            total=None if plan.jobs is None else len(plan.jobs),
            config_dir=config_dir and os.path.abspath(os.path.expanduser(config_dir)),
        )
        own = [f"hydra.sweep.dir={quoted(folder)}", "hydra.sweeper.params=null"]  # plan.words includes the params
        words = [*plan.words, *config.hydra.overrides.hydra, *own]
        return _run_sweep(this, plan, _multirun(hydra, this, words))


def _with_multirun(arguments: list[str]) -> tuple[str, ...]:
    """Return ``arguments`` with ``-m``, which an experiment or a launcher can imply."""
    return tuple(arguments if {"-m", "--multirun"} & set(arguments) else ["-m", *arguments])


def _multirun(hydra: Hydra, this: Sweep, words: list[str]) -> Callable[[], Any]:
    """Return a function that runs Hydra's multirun. The sweeper and the launcher are created here already, so that they raise
    for invalid keys before anything is written."""
    config = compose_config(hydra, words, RunMode.MULTIRUN)
    callbacks = Callbacks(config)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=this)

    def run() -> None:
        callbacks.on_multirun_start(config=config, config_name="config")
        sweeper.sweep(arguments=list(config.hydra.overrides.task))
        callbacks.on_multirun_end(config=config, config_name="config")

    return run


def _run_sweep(this: Sweep, plan: Plan, multirun: Callable[[], Any]) -> int:
    """Run the sweep, write its table, print the results, and return the exit code."""
    Interrupt().install()
    status, stopped_by = "failed", None
    with _running_in(this.folder):
        try:
            for words in plan.jobs or ():
                this.expect(this.job(words))
            this.write_table()
            multirun()
            status = ""
        except (Stopped, KeyboardInterrupt) as stop:
            status, stopped_by = "stopped", str(stop) or "Ctrl-C"
        finally:
            content = this.write_table(status or _status(this))
    code = EXIT_CODE if stopped_by else worst(_codes(this))
    make_nonblocking()  # a closed pipe on stdout must not fail the sweep
    show(this.folder, content)
    flush()  # the next messages go to stderr and must come after the table
    failed = _failures(this)
    if stopped_by:
        notice(f"stopped ({stopped_by}); to resume: {this.command_line}")
    elif failed:
        complain(f"error: every job of the sweep failed; the first one: {failed[0]['error']}")
    return code


def _states(this: Sweep) -> list[dict[str, Any]]:
    """Return the states of this command's jobs; the folder may contain other jobs."""
    return [state for _, state in jobs_in(this.folder) if state.get("began_at") == this.began_at]


def _codes(this: Sweep) -> list[int]:
    """Return the exit codes of this command's jobs."""
    return [0 if state["status"] == "pruned" else state["exit_code"] or 0 for state in _states(this)]


def _failures(this: Sweep) -> list[dict[str, Any]]:
    """Return the states of this command's jobs if all of them failed, else an empty list."""
    states = _states(this)
    return states if all(state["status"] == "failed" for state in states) else []


def _status(this: Sweep) -> str:
    codes = _codes(this)
    return "failed" if codes and all(codes) else "finished"


def worst(codes: list[int]) -> int:
    """Return the worst exit code: 1 (a bug, or a job that was killed), then 2 (a mistake), then 75 (stopped), then 0."""
    known = {0: 0, EXIT_CODE: EXIT_CODE, 2: 2}
    codes = [known.get(code, 1) for code in codes]
    return next((code for code in (1, 2, EXIT_CODE) if code in codes), 0)


@contextmanager
def _running_in(folder: Path) -> Iterator[None]:
    """Hold a shared lock in the folder, so that a reader sees that a sweep is running. Several sweeps may hold it at once."""
    try:
        make_folder(folder)
        check_private(folder, "sweep_dir")
        check_links(
            folder, "sweep_dir", (INTERNAL_FOLDER, f"{INTERNAL_FOLDER}/*", "sweep.json", "sweep.html", "optuna.journal")
        )
        file = os.fdopen(open_file(own_folder(folder / INTERNAL_FOLDER) / table.COMMAND_LOCK, os.O_RDWR), "r+")
    except OSError as error:
        raise UserError(f"sweep_dir={folder}: can't be written: {error.strerror}") from None
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield
