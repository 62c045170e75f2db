"""Check the parts of a config that Hydra itself would execute.

For a sweep, these are callbacks, factories in logging configs, a sweeper, a launcher, and the shell lines of its jobs. The
command line and conf/ may set all of them. Other config files may set only `MAY_SET` and plain values of a sweeper or a
launcher.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from pretrain.config.hydra_configs import compose_config, composing, options_of, plain_mistakes
from pretrain.config.hydra_internals import BASIC_LAUNCHER, BASIC_SWEEPER, Hydra
from pretrain.config.trust import COMMAND_LINE_ONLY
from pretrain.runtime.errors import UserError
from pretrain.runtime.redact import find_secret, secrets

MAY_SET = ("mode", "sweep.dir")  # keys of `hydra` that a file may set; a sweeper and a launcher are checked separately
# Hydra sets these keys itself; `overrides` are compared separately.
SET_BY_HYDRA = ("runtime", "overrides", "job.override_dirname", "job.config_name")
SWEEPERS = (BASIC_SWEEPER, "hydra_plugins.pretrain.OptunaSweeper")
LAUNCHERS = (
    BASIC_LAUNCHER,
    "hydra_plugins.pretrain.SideBySideLauncher",
    "hydra_plugins.pretrain.SlurmLauncher",
)
LAUNCHER_FOLDER = "${hydra.sweep.dir}/.submitit"  # jobs use a new folder inside it (slurm.fresh_folder)


def check_hydra(overrides: list[str], conf: Path, config_dir: str | None) -> None:
    """Check that all that Hydra would execute comes from conf/config.yaml, the user's conf/local or the command line.

    It is called before Hydra executes anything. The config is composed as the job will compose it, for a sweep over groups
    with each choice, and compared with the config of ``conf`` and the command line alone.

    Raises ``UserError`` when a file of a group, an experiment or ``config_dir`` has changed a key that files may not set.
    """
    with composing(conf, None) as hydra:
        own = [o for o in overrides if re.match(r"[+~]*hydra[./@]", o) and not _chooses_elsewhere(o, hydra)]
        allowed = _hydra_node(hydra, own, swept=True)
    with composing(conf, config_dir) as hydra:

        def check_job(words: list[str]) -> dict[str, Any]:
            found = _hydra_node(hydra, words)
            _check_node(found, allowed, words)
            return found

        first = _sweeps(overrides, hydra)[0]
        params = (check_job(first)["sweeper"] or {}).get("params") or {}
        words = [*(f"{key}={value}" for key, value in params.items()), *overrides]  # as Hydra applies an experiment's
        fixed, swept = _sweeps(words, hydra)
        for choices in itertools.product(*swept):
            if (job := [*fixed, *choices]) != first:
                check_job(job)


def _chooses_elsewhere(override: str, hydra: Hydra) -> bool:
    """Return whether an override such as ``hydra/launcher=mine`` chooses a file outside the shipped folder."""
    group, _, choice = override.partition("=")
    return "/" in group and "=" in override and choice not in options_of(hydra, group.lstrip("+~"))


def _hydra_node(hydra: Hydra, words: list[str], *, swept: bool = False) -> dict[str, Any]:
    """Return the composed node ``hydra``; ``swept``: some of ``words`` may have several values."""
    config = compose_config(hydra, words, RunMode.RUN, validate_sweep_overrides=not swept)
    if secret := find_secret(OmegaConf.to_yaml(config), secrets()):  # Hydra would write it to multirun.yaml
        raise UserError(f"a config file holds {secret}; no key takes a secret, set it in the environment only")
    node: Any = OmegaConf.to_container(config.hydra)
    return {str(key): value for key, value in node.items()}


def _check_node(found: dict[str, Any], expected: dict[str, Any], words: list[str]) -> None:
    words_found = [*found["overrides"]["task"], *found["overrides"]["hydra"]]
    if sorted(words_found) != sorted(words):
        raise _refused("overrides")
    if found["launcher"] != expected["launcher"] and (key := _executed_launcher_key(found["launcher"] or {})):
        raise _refused(f"launcher.{key}")
    if found["sweeper"] != expected["sweeper"] and not _only_sweeps(found["sweeper"]):
        raise _refused("sweeper")
    other = _without_checked_separately(found), _without_checked_separately(expected)
    if key := _first_difference(*other):
        raise _refused(key)


def _without_checked_separately(node: dict[str, Any]) -> dict[str, Any]:
    """Return ``node`` without the keys that are checked separately or not at all."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in node.items()}
    for path in ("launcher", "sweeper", *MAY_SET, *SET_BY_HYDRA):
        group, _, key = path.partition(".")
        (kept[group] if key else kept).pop(key or group, None)
    return kept


def _first_difference(found: Any, expected: Any, path: str = "") -> str:
    """Return the dotted path of the first key at which two nodes differ; an empty string where they are equal."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return "" if found == expected else path
    differing = [key for key in [*found, *expected] if found.get(key) != expected.get(key)]
    if not differing:
        return ""
    key = f"{path}.{differing[0]}".lstrip(".")
    return _first_difference(found.get(differing[0]), expected.get(differing[0]), key)


def _refused(key: str) -> UserError:
    return UserError(f"hydra.{key}: set by a config file, which Hydra would execute; not allowed there")


def _executed_launcher_key(launcher: dict[str, Any]) -> str | None:
    """Return the first key of a file's launcher that is not a plain setting (a number, a name) of a shipped launcher.

    Such keys are shell lines, options of sbatch, another class, and a folder of results. It returns ``None`` without one.
    """
    if launcher.get("_target_") not in LAUNCHERS:
        return "_target_"
    fixed = {"folder": LAUNCHER_FOLDER, "_target_": launcher["_target_"]}
    for key, value in launcher.items():
        plain = value in (None, [], {}) or (
            isinstance(value, int | float | str) and re.fullmatch(r"[\w.-]*", str(value))
        )
        if not (value == fixed[key] if key in fixed else plain):
            return key
    return None


def _only_sweeps(sweeper: Any) -> bool:
    """Return whether a file's sweeper only sets keys that a file may set; an experiment may define a sweep.

    Hydra instantiates the node with everything inside it, and ``params`` become the command lines of the jobs.
    """
    options = dict(sweeper or {})
    params = options.pop("params", None) or {}
    if options.get("_target_") not in SWEEPERS or not isinstance(params, dict):
        return False
    if not all(
        v is None or (isinstance(v, str | int | float) and "${" not in str(v)) for v in (options | params).values()
    ):
        return False
    keys = [str(key).lstrip("+") for key in params]
    allowed = [key not in COMMAND_LINE_ONLY and not key.startswith("hydra") for key in keys]
    return all(allowed) and all(re.fullmatch(r"[A-Za-z_][\w./@-]*", key) for key in keys)


def _sweeps(overrides: list[str], hydra: Hydra) -> tuple[list[str], list[list[str]]]:
    """Return the overrides that all jobs share, and for every swept group its choices. Swept keys are omitted."""
    fixed: list[str] = []
    swept: list[list[str]] = []
    with plain_mistakes():
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(overrides)
    for o in parsed:
        if not o.is_sweep_override():
            fixed.append(str(o.input_line))
        elif o.is_discrete_sweep() and hydra.config_loader.get_group_options(o.key_or_group):
            swept.append([f"{o.get_key_element()}={choice}" for choice in o.sweep_string_iterator()])
    return fixed, swept
