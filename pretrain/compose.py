"""From the words of a command line to a resolved config, and Hydra's complaints in plain words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pretrain.config import GROUPS, conf_dir
from pretrain.errors import UserError, did_you_mean
from pretrain.help import choices
from pretrain.trust import make_hydra


def forced(override: str) -> str:
    """``key=value`` → ``++key=value``: an unknown key then composes and `check`, who knows the keys, explains it."""
    key = override.split("=", 1)[0]
    if key.lstrip("+") in ("hydra.run.dir", "hydra.output_subdir"):
        raise UserError(f"{key}: the run folder is output_dir=...")
    if key.lstrip("+") == "hydra.sweep.subdir":
        raise UserError(f"{key}: a job's folder is named by its overrides; their common one is sweep_dir=...")
    groups = (*GROUPS, "experiment", "local")
    if "=" not in override or not re.match(r"[A-Za-z_]", key) or key in groups or re.search(r"[@/]", key):
        return override
    return override if key.split(".")[0] == "hydra" else f"++{override}"


def asks_for_sweep(arguments: list[str]) -> bool:
    """Whether a command line without ``-m`` means a sweep: it names a launcher (one run is a sweep of one job) or a sweeper,
    or its experiment is one (``hydra.mode: MULTIRUN``)."""
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    given, _ = get_args_parser().parse_known_args(arguments)
    if given.multirun or given.run or given.cfg or given.info or given.hydra_help or given.shell_completion:
        return False
    if any(a.startswith(("hydra/launcher=", "hydra/sweeper=")) for a in arguments):
        return True
    words = [a for a in arguments if re.match(r"\+?experiment=|hydra\.mode=", a)]
    if not words:
        return False
    try:
        found = make_hydra(conf_dir(), given.config_dir).get_mode("config", words)  # None: whoever composes it says why
    finally:
        GlobalHydra.instance().clear()
    return bool(found == RunMode.MULTIRUN)


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
        raise UserError(in_plain_words(error)) from None
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


def in_plain_words(error: Exception) -> str:
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
