"""The command line: compose, check, run. Imports no torch, so that help and mistakes answer at once.

A plain run is composed with Hydra's compose API; Hydra's own flags (`--cfg`, `--info`, …) go through `hydra.main`, sweeps
(`-m`) through pretrain.sweep, where every job is this command again in a fresh process.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pretrain import collector
from pretrain.compose import asks_for_sweep, forced, in_plain_words, resolve
from pretrain.config import check, conf_dir, gpu_visible
from pretrain.console import complain, notice, quiet_libraries
from pretrain.errors import UserError, WorkersFailed
from pretrain.flat import overrides_from
from pretrain.help import help_text
from pretrain.interrupt import EXIT_CODE, Interrupt, Stopped
from pretrain.redact import held, redact, secrets
from pretrain.streams import ensure_open, never_wait, settle
from pretrain.sweep.child import enter, note_failure
from pretrain.trust import COMMAND_LINE_ONLY, check_hydra, check_said, said


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code (0, 1, 2 or 75)."""
    arguments = sys.argv[1:] if argv is None else argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and leaving with 1
    try:
        code = _dispatch(arguments)
    except UserError as error:
        code = _mistake(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        code = _mistake(in_plain_words(error))
    except (Stopped, KeyboardInterrupt) as stop:
        notice(f"stopped ({stop or 'Ctrl-C'}); the same command goes on from here")
        code = EXIT_CODE
    except WorkersFailed as failure:
        note_failure(str(failure))
        notice(str(failure))
        code = 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    settle()
    sys.exit(code)


def program() -> NoReturn:
    """`main` as a process of its own. One that was in a process group ends without Python's clean-up: a thread of gloo's
    may want the interpreter while that is being taken down, which aborts the process in a few of a hundred ends."""
    collector.rarely()
    ensure_open()
    enter()
    faulthandler.enable()  # a bus error, a segmentation fault: say where
    try:
        main()
    except SystemExit as left:
        code = left.code
    except BaseException:
        note_failure(traceback.format_exc())
        sys.stderr.write(redact(traceback.format_exc()))
        settle()
        code = 1
    world = sys.modules.get("pretrain.world")
    if world is not None and world.group_entered:
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


def _mistake(message: str) -> int:
    note_failure(message)
    complain(f"error: {message}")
    return 2


def _dispatch(arguments: list[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        print(help_text(arguments))
        return 0
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder is gone: {error.strerror}; change to another one") from None
    spoken = said(arguments)
    arguments = _with_flat_file(arguments)
    if said(arguments) != spoken:
        raise UserError(f"--config: a file may not set {', '.join(COMMAND_LINE_ONLY)}; the command line may")
    known = secrets()
    for argument in arguments:
        if secret := held(argument, known):
            raise UserError(f"{argument}: holds {secret}; others see a command line, set it in the environment alone")
    if asks_for_sweep(arguments):
        arguments = ["-m", *arguments]
    if any(a.startswith("-") for a in arguments):
        return _hydra_main(arguments, spoken)
    overrides = [forced(a) for a in arguments]
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            config = hydra.compose("config", overrides=overrides)
        except ValueError as error:  # Hydra's word for a group override that makes no sense
            raise UserError(in_plain_words(error)) from None
    return run(config, overrides, spoken)


def _with_flat_file(arguments: list[str]) -> list[str]:
    """Replace ``--config FILE`` by what the file stands for."""
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise UserError("--config: which file?")
            return overrides_from(Path(arguments[i + 1]), arguments[:i] + arguments[i + 2 :])
        if argument.startswith("--config="):
            return overrides_from(Path(argument.split("=", 1)[1]), arguments[:i] + arguments[i + 1 :])
    return arguments


def _hydra_main(arguments: list[str], spoken: dict[str, Any]) -> int:
    """Sweeps and Hydra's own flags. ``spoken``: see `trust.said`."""
    overrides = [forced(a) for a in arguments if re.match(r"[+~A-Za-z_].*=|~", a)]
    flags = [a for a in arguments if not re.match(r"[+~A-Za-z_].*=|~", a)]  # argparse wants its own flags in one piece
    check_hydra(flags, overrides, conf_dir())
    logging.getLogger("pretrain").propagate = False  # notices are on stderr already; Hydra would say them again
    if {"-m", "--multirun"} & set(flags):
        if shown := {"--cfg", "-c", "--info", "-i"} & {flag.split("=")[0] for flag in flags}:
            raise UserError(f"{shown.pop()} shows one configuration: leave -m and the lists of values out")
        from pretrain.launch.slurm import SlurmLauncher
        from pretrain.sweep.command import sweep
        from pretrain.sweep.optuna_sweeper import OptunaSweeper
        from pretrain.sweep.plugins import register
        from pretrain.sweep.side_by_side import SideBySideLauncher

        register(OptunaSweeper, SideBySideLauncher, SlurmLauncher)
        return sweep(arguments, flags, overrides, spoken)
    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def job(config: DictConfig) -> None:
        codes.append(run(config, list(HydraConfig.get().overrides.task), spoken))

    sys.argv[1:] = flags + overrides
    job()
    return max(codes, default=0)


def run(config: DictConfig, overrides: list[str], spoken: dict[str, Any]) -> int:
    """Check a composed config and carry it out. ``spoken``: see `trust.said`."""
    resolved = resolve(config)
    check_said(resolved, spoken)
    check(resolved)
    interrupt = Interrupt()
    interrupt.install()
    if resolved["task"] in ("pretraining", "evaluation"):
        never_wait()  # what the other tasks say is their result: it waits for its reader
    quiet_libraries()
    if not gpu_visible():
        # Threads that spin while they wait make a CPU run 10 × slower as soon as another program wants a core.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pretrain.launch.launcher import launch

    return launch(resolved, overrides, interrupt)
