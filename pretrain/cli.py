"""The command line: compose, check, run. Imports no torch, so that help and mistakes answer at once.

A plain run is composed with Hydra's compose API; sweeps and Hydra's own flags (`-m`, `--cfg`, `--help`, …) go through
`hydra.main`, where every job of a sweep is this command again in a fresh process.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pretrain import collector
from pretrain.config import GROUPS, check, conf_dir, gpu_visible
from pretrain.console import complain, notice, quiet_libraries
from pretrain.errors import UserError, WorkersFailed, did_you_mean
from pretrain.flat import overrides_from
from pretrain.help import choices, help_text
from pretrain.interrupt import EXIT_CODE, SIGNALS, Interrupt, Stopped
from pretrain.redact import held, redact, secrets
from pretrain.streams import ensure_open, never_wait, settle
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
        code = _mistake(_in_plain_words(error))
    except (Stopped, KeyboardInterrupt) as stop:
        notice(f"stopped ({stop or 'Ctrl-C'}); the same command goes on from here")
        code = EXIT_CODE
    except WorkersFailed as failure:
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
    faulthandler.enable()  # a bus error, a segmentation fault: say where
    try:
        main()
    except SystemExit as left:
        code = left.code
    except BaseException:
        sys.stderr.write(redact(traceback.format_exc()))
        settle()
        code = 1
    world = sys.modules.get("pretrain.world")
    if world is not None and world.group_entered:
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


def _mistake(message: str) -> int:
    complain(f"error: {message}")
    return 2


def _dispatch(arguments: list[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        print(help_text(arguments))
        return 0
    spoken = said(arguments)
    arguments = _with_flat_file(arguments)
    if said(arguments) != spoken:
        raise UserError(f"--config: a file may not set {', '.join(COMMAND_LINE_ONLY)}; the command line may")
    known = secrets()
    for argument in arguments:
        if secret := held(argument, known):
            raise UserError(f"{argument}: holds {secret}; others see a command line, set it in the environment alone")
    if any(a.startswith("hydra/launcher=") for a in arguments) and not any(a.startswith("-") for a in arguments):
        arguments = ["-m", *arguments]  # launchers are for sweeps; one run is a sweep of one job
    if any(a.startswith("-") for a in arguments):
        return _hydra_main(arguments, spoken)
    overrides = [_forced(a) for a in arguments]
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            config = hydra.compose("config", overrides=overrides)
        except ValueError as error:  # Hydra's word for a group override that makes no sense
            raise UserError(_in_plain_words(error)) from None
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


def _forced(override: str) -> str:
    """``key=value`` → ``++key=value``: an unknown key then composes and `check`, who knows the keys, explains it."""
    key = override.split("=", 1)[0]
    if key.lstrip("+") in ("hydra.run.dir", "hydra.output_subdir"):
        raise UserError(f"{key}: the run folder is output_dir=...")
    groups = (*GROUPS, "experiment", "local")
    if "=" not in override or not re.match(r"[A-Za-z_]", key) or key in groups or re.search(r"[@/]", key):
        return override
    return override if key.split(".")[0] == "hydra" else f"++{override}"


def _hydra_main(arguments: list[str], spoken: dict[str, Any]) -> int:
    """Sweeps and Hydra's own flags. ``spoken``: see `trust.said`."""
    from pretrain.launch import slurm

    codes: list[int] = []
    slurm.register(codes)  # the launcher's jobs put their exit codes there too
    logging.getLogger("pretrain").propagate = False  # notices are on stderr already; Hydra would say them again

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def job(config: DictConfig) -> None:
        settings = HydraConfig.get()
        overrides = list(settings.overrides.task)
        if settings.mode == RunMode.MULTIRUN:
            codes.append(_fresh_process(overrides, Path(settings.sweep.dir) / settings.sweep.subdir))
        else:
            codes.append(run(config, overrides, spoken))

    overrides = [a for a in arguments if re.match(r"[+~A-Za-z_].*=|~", a)]
    flags = [a for a in arguments if a not in overrides]  # argparse wants its own flags in one piece
    if {"-m", "--multirun"} & set(flags):
        # A job's folder is named by what distinguishes it from the other jobs.
        swept = {o.split("=", 1)[0] for o in overrides if re.search(r"=.*(,|range\(|glob\(|choice\()", o)}
        common = {o.split("=", 1)[0] for o in overrides} - swept
        overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(common))}]")
    else:
        overrides = [_forced(o) for o in overrides]
    check_hydra(flags, overrides, conf_dir())
    sys.argv[1:] = flags + overrides
    job()
    return _worst(codes)


def _fresh_process(overrides: list[str], output_dir: Path) -> int:
    """One job of a sweep, in its own folder. A fresh process: no state of an earlier job can leak into it."""
    from pretrain.launch.slurm import command_line

    process = subprocess.Popen(command_line(overrides, output_dir))
    # The job decides when to stop. A terminal sends it Ctrl-C by itself; the other signals are passed on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in SIGNALS[1:]:
        signal.signal(number, lambda received, frame: process.send_signal(received))
    code = process.wait()
    if code == EXIT_CODE:
        raise Stopped("a job of the sweep was stopped and has saved")
    if code:
        notice(f"job {' '.join(overrides)} left with exit code {code}")
    return code


def _worst(codes: list[int]) -> int:
    """A bug before a mistake before a stop; a job that was killed counts as a bug."""
    known = {0: 0, EXIT_CODE: EXIT_CODE, 2: 2}
    codes = [known.get(code, 1) for code in codes]
    return next((code for code in (1, 2, EXIT_CODE) if code in codes), 0)


def resolve(config: DictConfig) -> dict[str, Any]:
    """The composed config as a plain dict, with the run's name filled in.

    Raises ``UserError`` for an interpolation that leads nowhere.
    """
    OmegaConf.set_struct(config, False)
    if config.get("name") is None:
        config["name"] = default_name(config)
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_in_plain_words(error)) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def default_name(config: DictConfig) -> str:
    """``<model>-<dataset>``, with the task in front where it isn't pretraining."""
    dataset = config.get("dataset") or {}
    data = dataset.get("name") or Path(str(dataset.get("nameOrPath") or "data")).stem
    model = Path(str(config.get("model_name")))
    of_run = [model.parent.parent.name] if model.parent.name == "checkpoints" else []
    parts = [*of_run, model.name] + ([str(data)] if config.get("task") != "export" else [])
    if config.get("task") != "pretraining":
        parts.insert(0, str(config.get("task")))
    return re.sub(r"[^\w.-]+", "_", "-".join(parts))


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


def _in_plain_words(error: Exception) -> str:
    """Hydra's message in one line, with the key it is about and the nearest names where a choice does not exist."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: no such choice{did_you_mean(choice, choices(group))}"
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; give it one: {key}=..."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(line for line in lines if not re.match(r"(full_key|object_type|See https|Set the env)", line))
    return f"{key}: {message}" if key else message
