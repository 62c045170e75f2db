"""Compose and resolve a config from the words of a command line, and rephrase Hydra's error messages."""

from __future__ import annotations

import difflib
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pretrain.config.check import GROUPS, check, conf_dir
from pretrain.config.choices import choices, own_groups
from pretrain.config.hydra_configs import ComposingHydra, compose_config, composing
from pretrain.config.inherited_keys import drop_inherited_keys
from pretrain.config.interpolation import bounded_interpolation
from pretrain.config.quoting import PATH_KEYS
from pretrain.config.schema import RunConfig
from pretrain.config.trust import MULTI_SELECT, with_moved_targets
from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.runtime.places import each, joined

NAMED = ("parts", "domains", "tasks", *MULTI_SELECT)  # keys of mappings whose keys are names


def forced(override: str, config_dir: str | None = None) -> str:
    """Return ``++key=value`` for ``key=value``: Hydra then composes an unknown key too, and `check` explains it."""
    key = override.split("=", 1)[0]
    if key.lstrip("+") in ("hydra.run.dir", "hydra.output_subdir"):
        raise UserError(f"{key}: the run folder is output_dir=...")
    if key.lstrip("+") == "hydra.sweep.subdir":
        raise UserError(f"{key}: a job's folder is named by its overrides; their common one is sweep_dir=...")
    if key.lstrip("+") == "hydra.searchpath":
        raise UserError(f"{key}: another folder of configs is --config-dir FOLDER")
    if key in GROUPS and re.fullmatch(r"=([\d.+-][\d.e+-]*|true|false|null)", override[len(key) :], re.IGNORECASE):
        raise UserError(
            f"{override}: {key} is a group; choose {' · '.join(choices(key, config_dir))}, or set one of its keys: {key}.KEY=…"
        )
    if "=" in override and key.split("/")[0] in own_groups(config_dir) and "@" not in key and "." not in key:
        return f"{key}@{key.replace('/', '.')}{override[len(key) :]}"  # a place, which may be new
    groups = {*GROUPS, "experiment", "local"}
    if "=" not in override or not re.match(r"[A-Za-z_]", key) or key in groups or re.search(r"[@/]", key):
        return override
    return override if key.split(".")[0] == "hydra" else f"++{override}"


def asks_for_sweep(given: Namespace) -> bool:
    """Return whether a command line (from `flags.parse`) without ``-m`` is a sweep.

    It is one where it names a launcher (a single run is then a sweep of one job) or a sweeper, or where its experiment sets
    ``hydra.mode: MULTIRUN``.
    """
    if given.run or given.cfg or given.info or given.hydra_help:
        return False
    if any(word.startswith(("hydra/launcher=", "hydra/sweeper=")) for word in given.overrides):
        return True
    words = [word for word in given.overrides if re.match(r"\+?experiment=|hydra\.mode=", word)]
    if not words:
        return False
    with composing(conf_dir(), given.config_dir) as hydra, bounded_interpolation():
        # The mode is None for a config with an error, which is reported when it is composed.
        return bool(hydra.get_mode("config", words) == RunMode.MULTIRUN)


def compose(words: list[str], config_dir: str | None = None) -> DictConfig:
    """Return the config of one run, composed from conf/config.yaml and ``words``, without Hydra's own node."""
    with composing(conf_dir(), config_dir) as hydra:
        config = compose_config(hydra, words, RunMode.RUN)
        drop_inherited_keys(config, hydra.config_loader, words)
    with open_dict(config):
        del config["hydra"]
    return config


class ShowingHydra(ComposingHydra):
    """A Hydra that shows the config that `compose` returns."""

    def compose_config(
        self, config_name: str | None, overrides: list[str], *arguments: Any, **options: Any
    ) -> DictConfig:
        config = super().compose_config(config_name, overrides, *arguments, **options)
        drop_inherited_keys(config, self.config_loader, overrides)
        return config


def run_config(words: list[str], config_dir: str | None = None) -> RunConfig:
    """Return the checked config of the run that ``python -m pretrain *words`` would start.

    Raises ``UserError`` for a mistake.
    """
    try:
        config = compose([forced(word, config_dir) for word in words], config_dir)
        return check(resolve(config), config_dir=config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_plain_words(error)) from None


def resolve(config: DictConfig) -> dict[str, Any]:
    """Return the composed config as a plain dict, with the run's default name and with ``~`` in paths expanded.

    Raises ``UserError`` for an interpolation that can't be resolved.
    """
    OmegaConf.set_struct(config, False)
    try:
        with bounded_interpolation():
            if config.get("name") is None:
                config["name"] = default_name(config)
            resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(in_plain_words(error) + _misspelt(config, error)) from None
    assert isinstance(resolved, dict)
    return {str(key): _with_home_expanded(str(key), with_moved_targets(value)) for key, value in resolved.items()}


def _misspelt(config: DictConfig, error: OmegaConfBaseException) -> str:
    """Return a hint where a key without a value, or a group above it, stands beside one that is spelt almost like it."""
    if not isinstance(error, MissingMandatoryValue):
        return ""
    names = str(getattr(error, "full_key", None) or "").split(".")
    node: Any = OmegaConf.to_container(config)
    for i, name in enumerate(names):
        if not isinstance(node, dict):
            break
        others = [str(key) for key in node if key != name]
        if (
            i and names[i - 1] in NAMED
        ):  # names are the user's; only a part without a target is a misspelling of another
            others = [key for key in others if "_target_" not in str(node.get(key))]
        near = difflib.get_close_matches(name, others, n=1, cutoff=0.75)
        if near:
            return f" (there is {'.'.join([*names[:i], near[0]])}; a misspelling?)"
        node = node.get(name)
    return ""


def _with_home_expanded(key: str, value: Any) -> Any:
    """Return ``value`` with ``~/x`` and ``~user/x`` expanded in the values of all keys that are paths."""
    if isinstance(value, dict):
        return {name: _with_home_expanded(str(name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_home_expanded(key, item) for item in value]
    return os.path.expanduser(value) if key in PATH_KEYS and isinstance(value, str) else value


def default_name(config: DictConfig) -> str:
    """Return ``<model>-<dataset>``, with the task as prefix where it isn't pretraining."""
    dataset = config.get("dataset")
    if not isinstance(dataset, DictConfig):  # `check` reports it later
        dataset = DictConfig({})
    of_mixture = dataset.get("parts")
    places = each(dataset.get("nameOrPath"))
    names = list(of_mixture) if isinstance(of_mixture, DictConfig) else [Path(place).stem for place in places]
    data = dataset.get("name") or joined([str(name) for name in names]) or "data"
    model = Path(str(config.get("model_name")))
    of_run = [model.parent.parent.name] if model.parent.name == "checkpoints" else []
    parts = [*of_run, model.name] + ([str(data)] if config.get("task") != "export" else [])
    if config.get("task") == "merge":
        parts = [str(OmegaConf.select(config, "merge.method"))]
    if config.get("task") != "pretraining":
        parts.insert(0, str(config.get("task")))
    return re.sub(r"[^\w.-]+", "_", "-".join(parts))


def in_plain_words(error: Exception) -> str:
    """Return Hydra's error message as one line, with the key, and with the nearest name of a choice that does not exist."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: no such choice{did_you_mean(choice, error.options or [])}"
    if isinstance(error, ConfigCompositionException):
        if unknown := re.search(r"config group '(.+)' does not", str(error)):
            return f"{unknown[1]}@…: no such group{did_you_mean(unknown[1], GROUPS)}"
        if merged := re.match(r"Error merging override \+*(.+)", str(error)):
            return f"{merged[1]}: a value of another kind than the key's default"
    if isinstance(error, OverrideParseException):
        lines = [
            line.strip() for line in error.message.splitlines() if not re.match(r"\s*(Error parsing|See http|$)", line)
        ]
        reason = " ".join(lines).partition(" expecting ")[0]
        return f"{error.override.lstrip('+')}: can't be read ({reason}); a text with such characters needs quotes: \"key='...'\""
    if "maximum recursion depth" in str(error):
        return "nested too deeply for a config"
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; give it one: {key}=..."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(line for line in lines if not re.match(r"(full_key|object_type|See https|Set the env)", line))
    return f"{key}: {message}" if key else message
