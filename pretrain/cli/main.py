"""The command line: compose the config, check it, and run the task.

It does not import torch, so that help and error messages appear at once. Hydra composes and prints the config (`--cfg`,
`--info`, …). It executes nothing but sweeps (`-m`, see pretrain.sweep), in which every job is this command in a new process.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain.cli.flags import parse
from pretrain.cli.flat_yaml import overrides_from
from pretrain.cli.help import help_text
from pretrain.config.check import check, conf_dir, gpu_visible
from pretrain.config.compose import ShowingHydra, asks_for_sweep, compose, forced, in_plain_words, resolve
from pretrain.config.hydra_configs import composing, composing_once
from pretrain.config.hydra_internals import get_args_parser, register_plugins
from pretrain.config.hydra_trust import check_hydra
from pretrain.config.quoting import quoted, quoted_word
from pretrain.config.trust import COMMAND_LINE_ONLY, check_command_line_only, command_line_only_values
from pretrain.runtime import garbage_collector as collector
from pretrain.runtime.console import complain, notice, quiet_libraries
from pretrain.runtime.errors import UserError, WorkersFailed
from pretrain.runtime.filesystem import check_temporary_folder
from pretrain.runtime.redact import find_secret, redact, secrets
from pretrain.runtime.signals import EXIT_CODE, Interrupt, Stopped
from pretrain.runtime.streams import ensure_open, flush, make_nonblocking
from pretrain.sweep.child import enter, note_failure


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its exit code (0, 1, 2 or 75)."""
    arguments = sys.argv[1:] if argv is None else argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of print a message and exit with 1
    try:
        code = _dispatch(arguments)
    except UserError as error:
        code = _mistake(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        code = _mistake(in_plain_words(error))
    except (Stopped, KeyboardInterrupt) as stop:
        notice(f"stopped ({stop or 'Ctrl-C'}); the same command continues from here")
        code = EXIT_CODE
    except WorkersFailed as failure:
        note_failure(str(failure))
        notice(str(failure))
        code = 1
    except BrokenPipeError:  # the reader, for example `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    flush()
    sys.exit(code)


def program() -> NoReturn:
    """Run `main` as the only task of this process, and exit.

    A process that was in a process group skips the shutdown of the interpreter: a thread of gloo may access the interpreter
    during the shutdown, which aborts the process in a few percent of the cases.
    """
    collector.collect_rarely()
    ensure_open()
    enter()
    faulthandler.enable()  # prints the stacks on a bus error or a segmentation fault
    try:
        main()
    except SystemExit as left:
        code = left.code
    except BaseException:
        note_failure(traceback.format_exc())
        sys.stderr.write(redact(traceback.format_exc()))
        flush()
        code = 1
    world = sys.modules.get("pretrain.distributed.context")
    if world is not None and world.group_entered:
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


def _mistake(message: str) -> int:
    """Print a user's mistake and return its exit code. The message may have several lines and is printed as one."""
    message = " ".join(line.strip() for line in message.splitlines() if line.strip())
    note_failure(message)
    complain(f"error: {message}")
    return 2


def _dispatch(arguments: list[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        print(help_text(arguments))
        return 0
    if "--version" in arguments:
        print(f"pretrain {_version()}")
        return 0
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current folder no longer exists: {error.strerror}; change to another one") from None
    cli_values = command_line_only_values(arguments)
    arguments = _with_flat_file(arguments)
    if command_line_only_values(arguments) != cli_values:
        raise UserError(f"--config: a file may not set {', '.join(COMMAND_LINE_ONLY)}; the command line may")
    known = secrets()
    for argument in arguments:
        if secret := find_secret(argument, known):
            raise UserError(
                f"{redact(argument)}: holds {secret}; other users can see a command line, set it in the environment only"
            )
    given = parse(arguments)
    if given.shell_completion:
        return _complete(given.overrides)
    if given.multirun or asks_for_sweep(given):
        return _sweep(arguments, given, cli_values)
    overrides = [forced(quoted_word(word, sweeping=False), given.config_dir) for word in given.overrides]
    with composing_once():
        if given.config_dir or given.cfg or given.info or given.hydra_help:
            check_hydra(overrides, conf_dir(), given.config_dir)
        if given.cfg or given.info or given.hydra_help:
            return _show(given, overrides, cli_values)
        config = compose(overrides, given.config_dir)
    return run(config, overrides, cli_values, given.config_dir)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pretrain")
    except PackageNotFoundError:
        return "(not installed)"


def _with_flat_file(arguments: list[str]) -> list[str]:
    """Return the arguments with ``--config FILE`` replaced by the overrides that the file stands for."""
    given = [a for a in arguments if a == "--config" or a.startswith("--config=")]
    if len(given) > 1:
        raise UserError("--config: only one file is allowed")
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise UserError("--config: needs a file")
            return overrides_from(Path(arguments[i + 1]), arguments[:i] + arguments[i + 2 :])
        if argument.startswith("--config="):
            file = Path(os.path.expanduser(argument.split("=", 1)[1]))  # shells don't expand a ~ after the equals sign
            return overrides_from(file, arguments[:i] + arguments[i + 1 :])
    return arguments


def _sweep(arguments: list[str], given: Namespace, cli_values: dict[str, Any]) -> int:
    """Run a sweep and return its exit code. ``arguments`` are as typed; ``cli_values``: see `trust.command_line_only_values`."""
    overrides = [forced(quoted_word(word, sweeping=True), given.config_dir) for word in given.overrides]
    check_hydra(overrides, conf_dir(), given.config_dir)
    logging.getLogger("pretrain").propagate = False  # notices are on stderr already; Hydra would repeat them
    from pretrain.sweep.command import sweep
    from pretrain.sweep.launchers.side_by_side import SideBySideLauncher
    from pretrain.sweep.launchers.slurm import SlurmLauncher
    from pretrain.sweep.optuna_sweeper import OptunaSweeper

    register_plugins(OptunaSweeper, SideBySideLauncher, SlurmLauncher)
    return sweep(arguments, given.config_dir, overrides, cli_values)


def _show(given: Namespace, overrides: list[str], cli_values: dict[str, Any]) -> int:
    """Print what Hydra shows of a config. A config that no machine could run is refused first."""
    if given.cfg in ("job", "all"):
        config = compose(overrides, given.config_dir)
        if given.package and OmegaConf.select(config, given.package, throw_on_missing=False) is None:
            raise UserError(f"--package={given.package}: the configuration has no such key")
        resolved = resolve(config)
        check_command_line_only(resolved, cli_values)
        name = check(resolved, here=False, config_dir=given.config_dir).name
        if given.resolve:
            overrides = [*overrides, f"++name={quoted(name)}"]  # output_dir depends on it
    with composing(conf_dir(), given.config_dir, ShowingHydra) as hydra:
        if given.cfg:
            hydra.show_cfg("config", overrides, given.cfg, given.package, given.resolve)
        elif given.info:
            with _root_logger_restored():
                hydra.show_info(given.info, "config", overrides)
        else:
            given.overrides = overrides
            hydra.hydra_help("config", get_args_parser(), given)
    return 0


@contextmanager
def _root_logger_restored() -> Iterator[None]:
    """Restore the root logger at the end of the block; Hydra makes it print all messages on stdout."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _complete(words: list[str]) -> int:
    """Run Hydra's shell completion: `install=bash` or `query=bash`."""
    with composing(conf_dir(), None) as hydra:
        try:
            hydra.shell_completion("config", words)
        except ValueError as error:  # an unknown shell, or neither install nor query
            raise UserError(" ".join(str(error).split())) from None
    return 0


def run(config: DictConfig, overrides: list[str], cli_values: dict[str, Any], config_dir: str | None = None) -> int:
    """Check a composed config, run its task, and return the exit code. ``cli_values``: see `trust.command_line_only_values`."""
    resolved = resolve(config)
    check_command_line_only(resolved, cli_values)
    checked = check(resolved, config_dir=config_dir)
    check_temporary_folder()
    interrupt = Interrupt()
    interrupt.install()
    if checked.task in ("pretraining", "evaluation"):
        make_nonblocking()  # the output of the other tasks is their result, so writing it waits for the reader
    quiet_libraries()
    if not gpu_visible():
        # Threads that spin while they wait make a CPU run 10 × slower as soon as another program needs a core.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from pretrain.launch.launcher import launch

    return launch(checked, overrides, interrupt, config_dir=config_dir)
