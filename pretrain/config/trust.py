"""Make sure that a config file, which may come from another person, can't execute code.

A file may choose among pretrain's own parts and set their keys. Settings that bring other code into the process, or other
machines into the run, must be on the command line of the user who starts it. `pretrain.config.hydra_trust` checks the
settings that Hydra itself would execute.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pretrain.runtime.errors import UserError

COMMAND_LINE_ONLY = {  # key → the only value that it may have in a file
    "allow_targets": [],
    "model.trust_remote_code": False,
    "evaluation.lm_eval.include_path": None,  # the harness's YAML files can run code
    "launch.endpoint": None,  # the processes of a run exchange pickles
}
SCHEDULES = "pretrain.optim.schedule"
PARTS = {  # group → the class whose subclasses it may create; schedules are functions of one module
    "model": "pretrain.models.causal_lm.CausalLM",
    "dataset": "pretrain.data.sources.base.Dataset",
    "replay": "pretrain.data.replay.ReplayConfig",
    "strategy": "pretrain.strategy.base.Strategy",
    "precision": "pretrain.strategy.precision.Precision",
    "objective": "pretrain.strategy.objective.Objective",
    "optimizer": "pretrain.optim.base.OptimizerFactory",
    "scheduler": SCHEDULES,
    "checkpoint": "pretrain.checkpoint.config.CheckpointConfig",
    "evaluation": "pretrain.evaluation.config.EvaluationConfig",
    "generation": "pretrain.evaluation.prompts.Prompts",
    "merge": "pretrain.merging.config.MergeConfig",
    "stop_when": "pretrain.training.stop_rule.StopWhen",
    "guard": "pretrain.training.guard.config.GuardConfig",
    "telemetry": "pretrain.telemetry.config.TelemetryConfig",
    "launch": "pretrain.launch.config.LaunchConfig",
    "sweep": "pretrain.sweep.config.SweepConfig",
    "plan": "pretrain.plan.config.PlanConfig",
    "advise": "pretrain.advise.config.AdviseConfig",
    "sink": "pretrain.telemetry.sinks.base.Sink",
    "transform": "pretrain.models.transforms.base.ModelTransform",
    "hook": "pretrain.training.hook.Hook",
}
MULTI_SELECT = ("sink", "transform", "hook")  # groups with any number of choices, each under its own key
SOURCE = "pretrain.data.sources.base.Source"
TASK = "pretrain.evaluation.task.EvaluationTask"
LM_EVAL = "pretrain.evaluation.lm_eval.LmEval"
NESTED_PARTS = {  # pattern of the places of parts inside a group → the class of the parts
    r"dataset(\.parts\.[^.]+)+": PARTS["dataset"],
    r"replay\.source": SOURCE,
    r"evaluation\.domains\.[^.]+": SOURCE,
    r"evaluation\.tasks\.[^.]+": TASK,
    r"evaluation\.lm_eval": LM_EVAL,
}
INTERFACES = {*(PARTS[group] for group in MULTI_SELECT), TASK}  # a trusted part of these need not inherit
CLASSES = {*PARTS.values(), *NESTED_PARTS.values()} - {SCHEDULES, PARTS["optimizer"]}  # the others may be functions
MOVED = {  # `_target_` of an earlier version, which users' YAML files may contain → the present one
    "pretrain.precision.Precision": "pretrain.strategy.precision.Precision",
    "pretrain.checkpoint.policy.Policy": "pretrain.checkpoint.config.CheckpointConfig",
    "pretrain.evaluation.policy.Policy": "pretrain.evaluation.config.EvaluationConfig",
    "pretrain.guard.policy.Policy": "pretrain.training.guard.config.GuardConfig",
    "pretrain.launch.policy.Policy": "pretrain.launch.config.LaunchConfig",
    "pretrain.sweep.policy.Policy": "pretrain.sweep.config.SweepConfig",
    "pretrain.telemetry.policy.Policy": "pretrain.telemetry.config.TelemetryConfig",
    "pretrain.telemetry.csv.Csv": "pretrain.telemetry.sinks.csv.Csv",
    "pretrain.telemetry.jsonl.Jsonl": "pretrain.telemetry.sinks.jsonl.Jsonl",
    "pretrain.telemetry.tensorboard.TensorBoard": "pretrain.telemetry.sinks.tensorboard.TensorBoard",
    "pretrain.telemetry.terminal.Terminal": "pretrain.telemetry.sinks.terminal.Terminal",
    "pretrain.telemetry.wandb.Wandb": "pretrain.telemetry.sinks.wandb.Wandb",
}
OWN_NAME = re.compile(r"pretrain(\.[A-Za-z]\w*)+")


def locate(path: str, target: Any, base: str | type, *, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """Return the class or function that the ``_target_`` at ``path`` names.

    It must be one of ours that belongs to ``base`` (see ``PARTS``) and is in its package of ours, or be in ``trusted``, a
    list of classes, functions and packages. The name is checked before anything is imported, because an import executes code.
    Creating one of our parts has no side effects. Other functions of ours may have some, so a config can't call them.

    Raises ``UserError`` for any other target.
    """
    is_trusted = trusts(trusted, target)
    if not is_trusted and not (isinstance(target, str) and OWN_NAME.fullmatch(target)):
        raise _refused(path, target)
    if not is_trusted and not trusts([_package_of(base)], target):
        raise _not_allowed_here(path, target, base)
    try:
        found = _find(target)
    except Exception as error:
        raise UserError(f"{path}._target_={target!r}: {' '.join(str(error).split())}") from None
    if target not in trusted:
        real_name = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
        is_own = trusts(trusted, real_name) if is_trusted else real_name == target
        if not is_own:  # what the named module has imported itself, such as `pretrain.x.subprocess.Popen`
            raise _refused(path, target)
    if not is_trusted and not _belongs(found, base):
        raise _not_allowed_here(path, target, base)
    if is_trusted and isinstance(found, type) and name_of(base) in CLASSES:
        _check_kind(path, found, name_of(base))
    return found


def base_of(path: str) -> str:
    """Return the class to which a part at a path such as ``optimizer``, ``sink.csv`` or ``dataset.parts.es`` must belong.

    Raises ``UserError`` for a path at which only a trusted part may be.
    """
    group = path.rpartition(".")[0]
    nested = (base for pattern, base in NESTED_PARTS.items() if re.fullmatch(pattern, path))
    base = PARTS.get(path) or (PARTS[group] if group in MULTI_SELECT else next(nested, None))
    if base is None:
        raise UserError(f"{path}: not a place of a part")
    return base


def with_moved_targets(node: Any) -> Any:
    """Return ``node`` with the present name of each part that an earlier version had under another name."""
    if isinstance(node, dict):
        moved = {key: with_moved_targets(value) for key, value in node.items()}
        target = moved.get("_target_")
        return moved | {"_target_": MOVED[target]} if isinstance(target, str) and target in MOVED else moved
    return [with_moved_targets(item) for item in node] if isinstance(node, list) else node


def trusts(trusted: Sequence[str], target: Any) -> bool:
    """Return whether ``target`` is in ``trusted`` or in a package in ``trusted``."""
    return isinstance(target, str) and any(target == name or target.startswith(f"{name}.") for name in trusted)


def _check_kind(path: str, found: type, base: str) -> None:
    """Raise ``UserError`` for a trusted class without what a run needs of a part of ``base``."""
    kind: Any = _find(base)
    public = (_find(SOURCE) if base == PARTS["dataset"] else kind).__name__
    name = f"pretrain.{public}" if public in sys.modules["pretrain"].__all__ else base
    inherits = kind in found.__mro__  # some are protocols, which `issubclass` does not take
    if not inherits and base not in INTERFACES:
        raise UserError(f"{path}._target_={name_of(found)!r}: must be a subclass of {name}")
    needed = getattr(found if inherits else kind, "__abstractmethods__", ())
    missing = sorted(
        m for m in needed if getattr(getattr(found, m, None), "__isabstractmethod__", not hasattr(found, m))
    )
    if missing:
        raise UserError(f"{path}._target_={name_of(found)!r}: lacks {' and '.join(missing)}, which {name} describes")


def _find(name: str) -> Callable[..., Any]:
    from hydra.utils import get_object

    logger = logging.getLogger("hydra.utils")  # prints lines of its own about what the error says
    was_disabled, logger.disabled = logger.disabled, True
    try:
        found: Callable[..., Any] = get_object(name)
    finally:
        logger.disabled = was_disabled
    if not callable(found):
        raise TypeError("not a class or a function")
    return found


def _belongs(found: Any, base: str | type) -> bool:
    """Return whether ``found`` is a schedule, where ``base`` asks for one, or a concrete subclass of ``base``."""
    if base == SCHEDULES:
        names = set(inspect.signature(found).parameters) if inspect.isfunction(found) else set()
        return found.__module__ == base and {"step", "total_steps", "warmup_steps"} <= names
    kind: Any = _find(base) if isinstance(base, str) else base
    return isinstance(found, type) and kind in found.__mro__ and not inspect.isabstract(found)


def name_of(base: Any) -> str:
    return base if isinstance(base, str) else f"{base.__module__}.{base.__qualname__}"


def _package_of(base: str | type) -> str:
    """Return the package of ours, such as ``pretrain.optim``, that holds the parts of ``base``."""
    return ".".join(name_of(base).split(".")[:2])


def _not_allowed_here(path: str, target: str, base: str | type) -> UserError:
    what = name_of(base)
    if what == SOURCE and target.endswith(".Mixture"):
        return UserError(f"{path}: a mixture can't be here, only one dataset such as dataset@{path}=local")
    return UserError(f"{path}._target_={target!r}: not a part that is allowed here; allowed are those of {what}")


def _refused(path: str, target: Any) -> UserError:
    return UserError(
        f"{path}._target_={target!r}: a config may name pretrain's own parts only; if you trust this one, add "
        f"'allow_targets=[{target}]' to the command line"
    )


def command_line_only_values(arguments: list[str]) -> dict[str, Any]:
    """Return the values that the command line gives to the keys in ``COMMAND_LINE_ONLY``; the last value of a key counts."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    own = [a for a in arguments if a.partition("=")[0].lstrip("+") in COMMAND_LINE_ONLY and "=" in a]
    return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(own)}


def check_command_line_only(config: dict[str, Any], cli_values: dict[str, Any]) -> None:
    """Raise ``UserError`` when a key that only the command line may set has a value that a file has given.

    ``cli_values`` holds the values of the command line, from `command_line_only_values`.
    """
    for key, harmless in COMMAND_LINE_ONLY.items():
        value: Any = config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value not in (None, harmless, cli_values.get(key)):
            raise UserError(f"{key}={value}: set by a config file; if you trust it, put '{key}=…' on the command line")
