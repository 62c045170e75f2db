"""What a config file may not do, since it may come from somebody else: let code in.

A file chooses among pretrain's own parts and sets their keys. What brings other code into the process, or other
machines into the run, is said on the command line by the person who starts it; so is what Hydra itself would execute.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.redact import held, secrets

COMMAND_LINE_ONLY = {  # key → the value that a file may leave it at
    "allow_targets": [],
    "model.trust_remote_code": False,
    "launch.endpoint": None,  # processes of one run send each other pickles
}
HYDRA_EXECUTES = (  # callbacks and sweepers are instantiated, logging configs name factories
    *("callbacks", "sweeper", "hydra_logging", "job_logging", "searchpath", "job.env_set", "job.env_copy"),
    *("launcher.setup", "launcher.additional_parameters"),
)
SWEEPERS = ("hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "hydra_plugins.pretrain.OptunaSweeper")
SCHEDULES = "pretrain.optim.schedule"
PARTS = {  # group → the class whose subclasses it may make; schedules are functions of one module
    "model": "pretrain.models.causal_lm.CausalLM",
    "dataset": "pretrain.data.sources.base.Source",
    "strategy": "pretrain.strategy.base.Strategy",
    "precision": "pretrain.precision.Precision",
    "optimizer": "pretrain.optim.base.OptimizerFactory",
    "scheduler": SCHEDULES,
    "checkpoint": "pretrain.checkpoint.policy.Policy",
    "evaluation": "pretrain.evaluation.policy.Policy",
    "generation": "pretrain.evaluation.prompts.Prompts",
    "guard": "pretrain.guard.policy.Policy",
    "telemetry": "pretrain.telemetry.policy.Policy",
    "launch": "pretrain.launch.policy.Policy",
    "sweep": "pretrain.sweep.policy.Policy",
    "sink": "pretrain.telemetry.sink.Sink",
}
OWN_NAME = re.compile(r"pretrain(\.[A-Za-z]\w*)+")


def locate(path: str, target: Any, base: str | type, *, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """The class or function that the ``_target_`` at ``path`` names: one of ours that belongs to ``base`` (see ``PARTS``), or
    one of ``trusted``, which names classes, functions and packages.

    Raises ``UserError`` for any other. The name is judged before anything is imported: to import is to run code. Making
    one of our parts does nothing yet; to call any function of ours would do what its arguments say, so a config can't.
    """
    is_trusted = trusts(trusted, target)
    if not is_trusted and not (isinstance(target, str) and OWN_NAME.fullmatch(target)):
        raise _refused(path, target)
    try:
        found = _find(target)
    except Exception as error:
        raise UserError(f"{path}._target_={target!r}: {' '.join(str(error).split())}") from None
    if target in trusted:
        return found
    real_name = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if real_name != target:  # what that module, or a trusted package, has imported: `pretrain.x.subprocess.Popen`
        raise _refused(path, target)
    if not is_trusted and not _belongs(found, base):
        what = base if isinstance(base, str) else f"{base.__module__}.{base.__qualname__}"
        raise UserError(f"{path}._target_={target!r}: not a part that can stand here; allowed are those of {what}")
    return found


def trusts(trusted: Sequence[str], target: Any) -> bool:
    """Whether ``target`` is one of ``trusted``, or lies in a package among them."""
    return isinstance(target, str) and any(target == name or target.startswith(f"{name}.") for name in trusted)


def _find(name: str) -> Callable[..., Any]:
    from hydra.utils import get_object

    found: Callable[..., Any] = get_object(name)
    if not callable(found):
        raise TypeError("not a class or a function")
    return found


def _belongs(found: Any, base: str | type) -> bool:
    """Whether ``found`` is a class of ``base`` that can be made, or a schedule."""
    if base == SCHEDULES:
        names = set(inspect.signature(found).parameters) if inspect.isfunction(found) else set()
        return found.__module__ == base and {"step", "total_steps", "warmup_steps"} <= names
    kind: Any = _find(base) if isinstance(base, str) else base
    return isinstance(found, type) and kind in found.__mro__ and not inspect.isabstract(found)


def _refused(path: str, target: Any) -> UserError:
    return UserError(
        f"{path}._target_={target!r}: a config may name pretrain's own parts only; if you trust this one, add "
        f"'allow_targets=[{target}]' to the command line"
    )


def said(arguments: list[str]) -> dict[str, Any]:
    """What the command line itself gives the keys in ``COMMAND_LINE_ONLY``; the last one counts."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    own = [a for a in arguments if a.partition("=")[0].lstrip("+") in COMMAND_LINE_ONLY and "=" in a]
    return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(own)}


def check_said(config: dict[str, Any], spoken: dict[str, Any]) -> None:
    """Raises ``UserError`` when a key that only the command line may set has another value than it gave (``spoken``)."""
    for key, harmless in COMMAND_LINE_ONLY.items():
        value: Any = config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value not in (None, harmless, spoken.get(key)):
            raise UserError(f"{key}={value}: set by a config file; if you trust it, put '{key}=…' on the command line")


def make_hydra(conf: Path, config_dir: str | None) -> Any:
    """The Hydra that composes from ``conf``, and from the folder of ``--config-dir`` before it, as ``hydra.main`` makes it.

    Whoever makes one clears ``GlobalHydra`` in the end.
    """
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery

    search = create_config_search_path(str(conf))
    if config_dir:
        folder = f"file://{os.path.abspath(config_dir)}"
        search.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    return Hydra.create_main_hydra2("pretrain", search)


def check_hydra(flags: list[str], overrides: list[str], conf: Path) -> None:
    """What Hydra would execute has to come from conf/config.yaml, the user's conf/local or the command line.

    Called before ``hydra.main`` does so: it composes the config as that will, for a sweep over groups each choice.
    Raises ``UserError`` when a file of a group, an experiment or ``--config-dir`` has set such a key.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    given = get_args_parser().parse_args(flags)
    for flag in ("config_path", "config_name", "experimental_rerun"):  # the last one is a pickle
        if getattr(given, flag):
            raise UserError(
                f"--{flag.replace('_', '-')}: not here; a flat YAML is --config FILE, a folder --config-dir"
            )
    hydra = make_hydra(conf, given.config_dir)
    known = secrets()

    def composed(words: list[str]) -> dict[str, Any]:
        config = hydra.compose_config("config", words, RunMode.RUN, validate_sweep_overrides=False)
        if secret := held(OmegaConf.to_yaml(config), known):  # Hydra writes it to multirun.yaml
            raise UserError(f"a config file holds {secret}; no key takes a secret, set it in the environment alone")
        node = config.hydra
        found = {key: OmegaConf.select(node, key, throw_on_resolution_failure=False) or None for key in HYDRA_EXECUTES}
        found = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in found.items()}
        return {"overrides": [*node.overrides.task, *node.overrides.hydra]} | found

    def judge(words: list[str]) -> dict[str, Any]:
        """What the files add to the command line is refused; what is left."""
        found = composed(words)
        for key, value in found.items():
            expected = sorted(words) if key == "overrides" else by_command_line[key]
            same = (sorted(value) if key == "overrides" else value) == expected
            if not same and not (key == "sweeper" and _only_sweeps(value)):
                raise UserError(f"hydra.{key}: set by a config file, which Hydra would execute; not allowed there")
        return found

    try:
        by_command_line = composed([o for o in overrides if re.match(r"[+~]*hydra[./@]", o)])
        params = (judge(_sweeps(overrides, hydra.config_loader)[0])["sweeper"] or {}).get("params") or {}
        words = [
            *(f"{key}={value}" for key, value in params.items()),
            *overrides,
        ]  # so Hydra takes an experiment's params
        fixed, swept = _sweeps(words, hydra.config_loader)
        for choices in itertools.product(*swept):
            judge([*fixed, *choices])
    finally:
        GlobalHydra.instance().clear()


def _only_sweeps(sweeper: Any) -> bool:
    """Whether a sweeper that a file has set does nothing but choose keys that a file may set: an experiment may be a sweep.

    Hydra makes the node with all that is in it, and ``params`` become the command lines of jobs.
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


def _sweeps(overrides: list[str], loader: Any) -> tuple[list[str], list[list[str]]]:
    """The overrides that are the same in every job, and of every group that is swept the choices; swept keys left out."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    fixed: list[str] = []
    swept: list[list[str]] = []
    for o in OverridesParser.create(config_loader=loader).parse_overrides(overrides):
        if not o.is_sweep_override():
            fixed.append(str(o.input_line))
        elif o.is_discrete_sweep() and loader.get_group_options(o.key_or_group):
            swept.append([f"{o.get_key_element()}={choice}" for choice in o.sweep_string_iterator()])
    return fixed, swept
