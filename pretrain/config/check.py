"""Check every key and type of a composed config before a slow import.

Each group node is checked against the signature of its `_target_`, so that a misspelt key inside a group is an error and a
dataclass is the only place that lists its keys. The modules of the targets import torch inside their methods only.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from keyword import iskeyword
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from pretrain.config.choices import own_groups
from pretrain.config.defaults import conf_dir
from pretrain.config.group_keys import GROUP_KEYS
from pretrain.config.own_files import check_own_files, check_own_places
from pretrain.config.quoting import PATH_KEYS
from pretrain.config.schema import RUNTIME_ARGUMENTS, RootKeys, RunConfig, build_part
from pretrain.config.trust import MULTI_SELECT, NESTED_PARTS, PARTS, SCHEDULES, SOURCE, locate, name_of, trusts
from pretrain.optim.learning_rate import with_lr
from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.runtime.places import is_url
from pretrain.runtime.redact import find_secret, redact, secrets

GROUPS = tuple(PARTS)
OTHER_NAMES = {  # names of the Hugging Face Trainer and other libraries → our root keys
    "learning_rate": "lr",
    "max_learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "num_train_epochs": "number_epochs",
    "num_epochs": "number_epochs",
    "epochs": "number_epochs",
    "total_steps": "max_steps",
    "num_steps": "max_steps",
    "warmup_ratio": "warmup_proportion",
    "max_grad_norm": "grad_clip",
    "gradient_clip_val": "grad_clip",
    "block_size": "sequence_length",
    "max_seq_length": "sequence_length",
    "max_length": "sequence_length",
    "num_gpus": "devices",
    "logging_steps": "log_every",
    "eval_steps": "evaluate_every",
    "save_steps": "save_every",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "model_name_or_path": "model_name",
    "lr_scheduler": "scheduler",
    "parallelization_strategy": "strategy",
    "report_to": "sink",
}
HYDRA_KEYS = ("_target_", "_partial_")  # keys of Hydra that a part may have; arguments of its others can't be checked
ALL_HYDRA_KEYS = (*HYDRA_KEYS, "_args_", "_recursive_", "_convert_")
LONGEST_NAME = 255  # bytes of a file's name, on all file systems of Linux


def check(config: dict[str, Any], *, here: bool = True, config_dir: str | None = None) -> RunConfig:
    """Check a resolved config (unknown keys, types, ranges, impossible combinations) and build the typed config.

    Args:
        config: The resolved config as a dict of plain values.
        here: Check also that this machine can run it; ``False`` for a run on a machine with other devices.

        config_dir: The folder of ``--config-dir``; a group that only it has is a known key.

    Raises:
        UserError: A mistake in the config; the message names the key, its value and what is allowed.
    """
    given, known = config, {*(field.name for field in fields(RootKeys)), *GROUPS}
    if unknown := [key for key in config if key not in known and key not in own_groups(config_dir)]:
        raise UserError(f"unknown key {unknown[0]!r}{known_as(unknown[0], known)}")
    for key, hint in get_type_hints(RootKeys, include_extras=True).items():
        check_value(key, config.get(key), hint)
    check_leaves(config)
    config = with_lr(config, 1e-3)  # lr=auto is checked with an arbitrary number
    for group in GROUPS:
        node = config.get(group) or {}
        if group not in MULTI_SELECT:
            if isinstance(node, dict) and "_target_" not in node:
                check_own_files(group, node, config_dir)
            check_own_places(group, node, config_dir)
            check_part(group, node, PARTS[group], config["allow_targets"])
            continue
        if not isinstance(node, dict):
            raise UserError(f"{group}={node!r}: not a choice of this group; --help lists them")
        for name, part in node.items():
            if not isinstance(part, dict) or "_target_" not in part:
                check_own_files(group, node, config_dir)
                raise UserError(
                    f"{group}.{name}: {name!r} is not among the chosen {group}s; add it: {group}=[…,{name}]"
                )
            check_part(f"{group}.{name}", part, PARTS[group], config["allow_targets"])
    if here and config["task"] != "plan":
        check_here(config)
    run = RunConfig.of(given)
    run.check_data()
    for transform in run.transforms:
        getattr(transform, "check", lambda: None)()
    run.check_schedule()
    run.merge.check_curve()
    run.check_export()
    if run.task == "merge":
        run.merge.check()
    if run.task == "advise":
        run.advise.check()
    return run


def known_as(key: str, known: set[str]) -> str:
    """Return a hint with the nearest known key, which is also found by its names in other trainers."""
    others = [name for name, here in OTHER_NAMES.items() if here in known]
    near = difflib.get_close_matches(key, [*known, *others], n=1, cutoff=0.7)
    if near and near[0] in others:
        return f"; here it is {OTHER_NAMES[near[0]]!r}"
    return did_you_mean(key, known)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    return node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every node that is not a mapping or list."""
    if not isinstance(node, dict | list):
        yield path, node
    for key, value in _items(node):
        yield from leaves(value, f"{path}.{key}" if path else f"{key}")


def check_leaves(config: dict[str, Any]) -> None:
    """Check every leaf of a resolved config.

    Raises ``UserError`` for

    - a secret, which would be written to config.yaml and to every checkpoint;
    - an interpolation that is the result of another one: resolving it again could create an unchecked node;
    - values that a file or a tensor can't hold: integers of more than 64 bits, NaN, strings that are not UTF-8.
    """
    known = secrets()
    for path, value in leaves(config):
        if not _is_text(path):
            raise UserError(f"{path!a}: a key must be UTF-8 without zero bytes")
        secret = find_secret(path, known) or find_secret(str(value) if _is_number_of_64_bits(value) else "", known)
        if secret:
            raise UserError(f"{redact(path)}: holds {secret}; no key takes a secret, set it in the environment only")
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{path}={value!r}: a value can't contain '${{', the start of an interpolation")
        if (
            isinstance(value, str)
            and path.rpartition(".")[2] in PATH_KEYS
            and not is_url(value)
            and _is_too_long(value)
        ):
            raise UserError(
                f"{path}={value[:40]}…: a part of it is longer than a file's name can be ({LONGEST_NAME} bytes)"
            )
        if isinstance(value, str) and not _is_text(value):
            raise UserError(f"{path}={value!a}: not UTF-8, or it contains a zero byte")
        if not _is_number_of_64_bits(value):
            raise UserError(f"{path}: an integer of more than 64 bits, or NaN")
        if not isinstance(value, str | int | float | None):
            raise UserError(
                f"{path}={value!r}: a {type(value).__name__}; allowed are texts, numbers, true, false and null"
            )


def _is_too_long(path: str) -> bool:
    return any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split(os.sep))


def _is_text(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_number_of_64_bits(value: Any) -> bool:
    """Return whether ``value`` is not an integer of more than 64 bits and not NaN."""
    return not (isinstance(value, int) and abs(value) >= 2**63) and value == value


def check_part(path: str, node: Any, base: str | type, trusted: list[str], *, others: Iterable[str] = ()) -> None:
    """Check a node from which an object is built.

    Its target must be a part of ``base`` (see `trust.PARTS`) or in ``trusted``, its keys must be parameters of the target,
    and their values must match the target's annotations. Raises ``UserError`` otherwise. ``others`` are the names of the parts
    next to it.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{path}={node or None!r}: {_how_chosen(path, base, others)}")
    target = locate(path, node["_target_"], base, trusted=trusted)
    _check_partial(path, node, base, is_trusted=trusts(trusted, node["_target_"]))
    parameters, hints = _arguments(path, target)
    if path in GROUP_KEYS:
        shared = _arguments(path, GROUP_KEYS[path])
        parameters, hints = parameters | shared[0], hints | shared[1]
    of_run = RUNTIME_ARGUMENTS.get(path, set())
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    parameters = {key: p for key, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for key, value in node.items():
        if key in HYDRA_KEYS:
            continue
        if (key not in parameters and not takes_any) or key in of_run:
            allowed = set(parameters) - of_run
            raise UserError(
                f"{path}: {target.__name__} has no {key!r}{_owner(path, key) or did_you_mean(str(key), allowed)}"
            )
        check_nested(f"{path}.{key}", value, hints.get(key, Any), trusted)
    if not node.get("_partial_"):
        for key, parameter in parameters.items():
            if parameter.default is inspect.Parameter.empty and key not in {*node, *of_run}:
                raise UserError(f"{path}.{key} is missing: {target.__name__} needs it")


def _how_chosen(path: str, base: str | type, others: Iterable[str]) -> str:
    """Return how a part is chosen, for the message about a node that is none, and the name of the ``others`` that is spelt
    almost like it."""
    if "." in path and name_of(base) in (PARTS["dataset"], SOURCE):
        near = difflib.get_close_matches(path.rpartition(".")[2], others, n=1)
        meant = f"; did you mean {near[0]!r}? If not," if near else ";"
        return f"not a dataset{meant} choose its kind: dataset@{path}=local {path}.nameOrPath=…"
    return "not a choice of this group; --help lists them"


def _arguments(path: str, target: Any) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Return the parameters of a target and their annotations, as far as they can be resolved, by their keys in YAML."""
    annotated: Any = target  # the annotations of a dataclass are its own, those of another class its constructor's
    if isinstance(target, type) and not is_dataclass(target):
        annotated = target.__init__  # type: ignore[misc]
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # written in C
        raise UserError(f"{path}._target_={target.__name__!r}: has no signature to check its keys against") from None
    try:
        hints = get_type_hints(annotated, include_extras=True)
    except Exception:  # a trusted part may name types that only a type checker imports
        hints = {}
    return {in_yaml(name): p for name, p in parameters.items()}, {in_yaml(name): hint for name, hint in hints.items()}


def _check_partial(path: str, node: dict[str, Any], base: str | type, *, is_trusted: bool) -> None:
    """Check ``_partial_``: true for a schedule, which is a function with bound arguments, and false for other parts."""
    partial = node.get("_partial_", False)
    wanted = [True, False] if is_trusted else [base == SCHEDULES]
    if not isinstance(partial, bool) or partial not in wanted:
        raise UserError(f"{path}._partial_={partial!r}: here it must be {str(wanted[0]).lower()}")


def check_nested(path: str, value: Any, hint: Any, trusted: list[str]) -> None:
    """Check a value of a part against its annotation.

    A value may contain parts where the annotation names their class, such as ``dict[str, Source]``. Elsewhere a node with a
    ``_target_`` must be trusted.
    """
    base = part_in(hint)
    is_mapping = base is not None and base not in (hint, *_union_members(hint))
    if isinstance(value, dict) and trusts(trusted, value.get("_target_")):
        check_part(path, value, Any if base is None or is_mapping else base, trusted)
        return
    if isinstance(value, dict) and is_mapping and "_target_" in value:
        raise UserError(f"{path}: each of its items needs a name: {path}.NAME instead of {path}")
    check_value(path, value, hint if base is None else _with_node_types(hint, base))
    if base is not None and value is not None and not is_mapping:
        check_part(path, value, base, trusted)
        return
    for key, item in _items(value):
        if base is not None:
            others = [str(name) for name, other in _items(value) if isinstance(other, dict) and "_target_" in other]
            check_part(f"{path}.{key}", item, base, trusted, others=others)
        elif key in ALL_HYDRA_KEYS:
            raise UserError(
                f"{path}.{key}={item!r}: a config can't create an object here; if you trust it, add "
                f"'allow_targets=[{item}]' to the command line"
            )
        else:
            check_nested(f"{path}.{key}", item, Any, trusted)


def part_in(hint: Any) -> type | None:
    """Return the class of parts that an annotation names, either directly or as the item type of a mapping."""
    if isinstance(hint, type) and f"{hint.__module__}.{hint.__qualname__}" in (*PARTS.values(), *NESTED_PARTS.values()):
        return hint
    return next((part for part in map(part_in, get_args(hint)) if part is not None), None)


def _with_node_types(hint: Any, base: type) -> Any:
    """Return ``hint`` with any value in place of ``base``, whose node is checked separately."""
    if hint is base:
        return Any
    arguments = tuple(_with_node_types(argument, base) for argument in get_args(hint))
    origin = Union if get_origin(hint) is UnionType else get_origin(hint)
    return origin[arguments] if arguments else hint


def _union_members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union such as ``Source | None``; of other annotations nothing."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else ()


def in_yaml(name: str) -> str:
    """Return a parameter's key in YAML: ``async_``, whose name would be a keyword of Python, is the key ``async``."""
    return name[:-1] if iskeyword(name[:-1]) else name


def _owner(path: str, key: Any) -> str | None:
    """Return a hint with the other choices of the group at ``path`` that have this key; ``None`` where none has."""
    is_nested = re.match(r"dataset\.|evaluation\.domains\.|replay\.source", path)
    group, word = ("dataset", f"dataset@{path}") if is_nested else (path, path)
    files = sorted((conf_dir() / group).glob("*.yaml"))
    owners = [f"{word}={file.stem}" for file in files if key in list(OmegaConf.load(file))]  # `in` alone skips `???`
    return f"; it is a key of {' and '.join(owners)}" if owners else None


def check_value(key: str, value: Any, hint: Any) -> None:
    """Raise ``UserError`` when ``value`` does not match the annotation ``hint``."""
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except PydanticSchemaGenerationError:  # a trusted part is annotated with a class of its own
        return
    except ValidationError as error:
        reasons = dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in error.errors(include_url=False))
        shown = "null" if value is None else f"{value!r}"
        raise UserError(f"{key}={shown}: {' or '.join(reasons)}{_nearest(value, hint)}") from None


def _nearest(value: Any, hint: Any) -> str:
    """Return a hint with the nearest of the words that an annotation allows; empty where none is near."""
    words = [word for word in get_args(hint) if isinstance(word, str)] if get_origin(hint) is Literal else []
    found = did_you_mean(value, words) if isinstance(value, str) else ""
    return found if found.startswith("; did you mean") else ""


def check_options(prefix: str, options: Any) -> None:
    """Check the fields of a dataclass against their types. A ``UserError`` names the key as ``<prefix>.<field>``."""
    for key, hint in get_type_hints(type(options), include_extras=True).items():
        check_value(f"{prefix}.{key}", getattr(options, key), hint)


def check_here(config: dict[str, Any]) -> None:
    """Raise ``UserError`` where this machine lacks what the precision or a sink needs."""
    build_part(config["precision"]).check("cuda" if gpu_visible() else "cpu")
    for name, sink in (config.get("sink") or {}).items():
        if hasattr(locate(f"sink.{name}", sink["_target_"], PARTS["sink"], trusted=config["allow_targets"]), "check"):
            build_part(sink).check()


def gpu_visible() -> bool:
    """Return whether this process may use a GPU, by the driver's files and the usual variables, without torch."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if variable in os.environ:
            return any(d.strip() not in ("", "-1") for d in os.environ[variable].split(","))
    return any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
