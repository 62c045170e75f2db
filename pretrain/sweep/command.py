"""`python -m pretrain -m …`: plan, check, run, and say what came of it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from pretrain.config.check import check_part, conf_dir
from pretrain.config.hydra_configs import compose_config, composing
from pretrain.config.schema import build_part
from pretrain.config.trust import PARTS
from pretrain.runtime.console import complain, notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.folders import check_links, check_private, make_folder
from pretrain.runtime.safe_files import open_file, own_folder
from pretrain.runtime.signals import EXIT_CODE, Interrupt, Stopped
from pretrain.runtime.streams import flush, make_nonblocking
from pretrain.sweep import table
from pretrain.sweep.config import SweepConfig
from pretrain.sweep.job import KEPT, jobs_in
from pretrain.sweep.jobs import Sweep, quoted
from pretrain.sweep.plan import Plan
from pretrain.sweep.show import show


def sweep(arguments: list[str], config_dir: str | None, overrides: list[str], spoken: dict[str, Any]) -> int:
    """Run a sweep; its exit code is the worst of its jobs'. ``arguments``: as they were typed; ``config_dir`` and
    ``overrides``: as Hydra gets them; ``spoken``: see `trust.command_line_only_values`.

    Raises ``UserError`` for a mistake in any job, before the first one starts.
    """
    with composing(conf_dir(), config_dir) as hydra:
        config = compose_config(hydra, [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        plan = Plan(hydra.config_loader, config)
        plan.check(spoken)
        folder = Path(os.path.expanduser(config.sweep_dir or config.hydra.sweep.dir))
        check_part("sweep", OmegaConf.to_container(config.sweep, resolve=True), PARTS["sweep"], [])
        policy: SweepConfig = build_part(dict(config.sweep))
        this = Sweep(
            folder=folder,
            keys=plan.keys,
            metric=policy.metric,
            direction=policy.direction,
            command=_as_sweep(arguments),
            began_at=time.time(),
            total=None if plan.jobs is None else len(plan.jobs),
            config_dir=config_dir and os.path.abspath(os.path.expanduser(config_dir)),
        )
        own = [f"hydra.sweep.dir={quoted(folder)}", "hydra.sweeper.params=null"]  # the params are among plan.words
        words = [*plan.words, *config.hydra.overrides.hydra, *own]
        return _carry_out(this, plan, _multirun(hydra, this, words))


def _as_sweep(arguments: list[str]) -> tuple[str, ...]:
    """The words that say the same again, with the ``-m`` that an experiment or a launcher stands for."""
    return tuple(arguments if {"-m", "--multirun"} & set(arguments) else ["-m", *arguments])


def _multirun(hydra: Hydra, this: Sweep, words: list[str]) -> Callable[[], Any]:
    """Hydra's multirun, ready to be started: so sweeper and launcher refuse what is wrong with their keys before anything is
    written."""
    config = compose_config(hydra, words, RunMode.MULTIRUN)
    callbacks = Callbacks(config)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=this)

    def run() -> None:
        callbacks.on_multirun_start(config=config, config_name="config")
        sweeper.sweep(arguments=list(config.hydra.overrides.task))
        callbacks.on_multirun_end(config=config, config_name="config")

    return run


def _carry_out(this: Sweep, plan: Plan, multirun: Callable[[], Any]) -> int:
    """The exit code of the sweep, once its folder and the terminal say what came of it."""
    Interrupt().install()
    status, stopped_by = "failed", None
    with _at_work(this.folder):
        try:
            for words in plan.jobs or ():
                this.expect(this.job(words))
            this.write_table()
            multirun()
            status = ""
        except (Stopped, KeyboardInterrupt) as stop:
            status, stopped_by = "stopped", str(stop) or "Ctrl-C"
        finally:
            told = this.write_table(status or _status(this))
    code = EXIT_CODE if stopped_by else worst(_codes(this))
    make_nonblocking()  # a reader of the table that has left is no failure
    show(this.folder, told)
    flush()  # what is said next is on stderr, and comes after it
    failed = _failures(this)
    if stopped_by:
        notice(f"stopped ({stopped_by}); to go on: {this.command_line}")
    elif failed:
        complain(f"error: every job of the sweep failed; the first one: {failed[0]['error']}")
    return code


def _states(this: Sweep) -> list[dict[str, Any]]:
    """Of this command's jobs; the folder may hold others."""
    return [state for _, state in jobs_in(this.folder) if state.get("began_at") == this.began_at]


def _codes(this: Sweep) -> list[int]:
    """The exit codes of this command's jobs."""
    return [0 if state["status"] == "pruned" else state["exit_code"] or 0 for state in _states(this)]


def _failures(this: Sweep) -> list[dict[str, Any]]:
    """This command's jobs where every one of them failed, else nothing."""
    states = _states(this)
    return states if all(state["status"] == "failed" for state in states) else []


def _status(this: Sweep) -> str:
    codes = _codes(this)
    return "failed" if codes and all(codes) else "finished"


def worst(codes: list[int]) -> int:
    """A bug before a mistake before a stop; a job that was killed counts as a bug."""
    known = {0: 0, EXIT_CODE: EXIT_CODE, 2: 2}
    codes = [known.get(code, 1) for code in codes]
    return next((code for code in (1, 2, EXIT_CODE) if code in codes), 0)


@contextmanager
def _at_work(folder: Path) -> Iterator[None]:
    """Meanwhile whoever reads the folder can see that a sweep is at work in it; several may be."""
    try:
        make_folder(folder)
        check_private(folder, "sweep_dir")
        check_links(folder, "sweep_dir", (KEPT, f"{KEPT}/*", "sweep.json", "sweep.html", "optuna.journal"))
        file = os.fdopen(open_file(own_folder(folder / KEPT) / table.COMMAND_LOCK, os.O_RDWR), "r+")
    except OSError as error:
        raise UserError(f"sweep_dir={folder}: can't be written: {error.strerror}") from None
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield
