"""The root keys, and `check`: every key and type of a composed config, before anything heavy is imported.

Each group node is checked against the signature of its `_target_`, so that a key misspelt inside a group is an error and
a dataclass is the only place where its keys are listed. The targets' modules import torch inside their methods.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import OmegaConf
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from pretrain.errors import UserError, did_you_mean
from pretrain.optim.learning_rate import with_lr
from pretrain.redact import held, secrets
from pretrain.shipped import conf_dir
from pretrain.trust import locate

Finite = Field(allow_inf_nan=False)
Beta = Annotated[float, Field(ge=0, lt=1)]
GROUPS = (
    "model",
    "dataset",
    "strategy",
    "precision",
    "optimizer",
    "scheduler",
    "checkpoint",
    "evaluation",
    "generation",
    "guard",
    "telemetry",
    "launch",
    "sweep",
    "sink",
)
OTHER_NAMES = {  # what the Hugging Face Trainer and others call our root keys
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
HYDRA_KEYS = {"_target_", "_partial_"}  # Hydra has more; arguments without a name, or unconverted, can't be checked
RUNTIME_ARGUMENTS = {"step", "total_steps", "warmup_steps"}  # of a schedule: given by the builder, never by YAML


@dataclass(frozen=True)
class Root:
    """The keys of conf/config.yaml that are no group. The comments there say what each is for."""

    task: Literal["pretraining", "tokenization", "evaluation", "generation", "export"]
    name: Annotated[str, Field(pattern=r"^\.*[^/\\.\x00-\x1f][^/\\\x00-\x1f]*$")]  # a folder's: not `..`, no path
    output_dir: Annotated[str, Field(min_length=1)]
    model_name: Annotated[str, Field(min_length=1)]
    sequence_length: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt | Literal["auto"]
    gradient_accumulation_steps: PositiveInt
    number_epochs: Annotated[PositiveFloat, Finite]
    max_steps: PositiveInt | None
    lr: Annotated[PositiveFloat, Finite] | Literal["auto"]
    warmup_proportion: Annotated[float, Field(ge=0, le=1)]
    weight_decay: Annotated[NonNegativeFloat, Finite]
    beta1: Beta
    beta2: Beta
    grad_clip: Annotated[PositiveFloat, Finite] | None
    seed: NonNegativeInt
    devices: Literal["auto"] | PositiveInt
    sweep_dir: Annotated[str, Field(min_length=1)] | None
    resume: Annotated[str, Field(min_length=1)]
    resume_allow: list[Literal["tokenizer", "data", "sequence_length", "global_batch", "seed", "weights", "optimizer"]]
    log_every: PositiveInt
    evaluate_every: PositiveInt | None
    save_every: PositiveInt | None
    allow_targets: list[str]


def check(config: dict[str, Any], *, here: bool = True) -> Root:
    """Check a resolved config, whole: unknown keys, types, ranges, and combinations that can't work.

    ``here``: it is to run on this machine, not on one that may have other devices.

    Raises ``UserError`` naming the key, its value and what is allowed.
    """
    root_keys, given = {field.name for field in fields(Root)}, config
    for key in config:
        if key not in root_keys and key not in GROUPS:
            raise UserError(f"unknown key {key!r}{_known_as(key, root_keys | set(GROUPS))}")
    for key, hint in get_type_hints(Root, include_extras=True).items():
        check_value(key, config.get(key), hint)
    check_leaves(config)
    config = with_lr(config, 1e-3)  # any number will do for the check of what follows it
    for group in GROUPS:
        node = config.get(group) or {}
        nodes = list(targets(group, node))
        if group != "sink" and not nodes:
            raise UserError(f"{group}={node or None!r}: not a choice of this group; --help lists them")
        for name, sink in node.items() if group == "sink" else ():
            if not isinstance(sink, dict) or "_target_" not in sink:
                raise UserError(f"sink.{name}: {name!r} is not among the chosen sinks; add it: sink=[…,{name}]")
        for path, found in nodes:
            check_node(path, found, config["allow_targets"])
    if here:
        check_here(config)
    return Root(**{key: given[key] for key in root_keys})


def _known_as(key: str, known: set[str]) -> str:
    """The nearest known key, also by the name that other trainers give it."""
    near = difflib.get_close_matches(key, [*known, *OTHER_NAMES], n=1, cutoff=0.7)
    if near and near[0] in OTHER_NAMES:
        return f"; here it is {OTHER_NAMES[near[0]]!r}"
    return did_you_mean(key, known)


def targets(path: str, node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a ``_target_`` at or below ``node``, in lists too, with its dotted path."""
    if isinstance(node, dict) and "_target_" in node:
        yield path, node
    for key, value in _items(node):
        yield from targets(f"{path}.{key}", value)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    return node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping or list, with its dotted path."""
    if not isinstance(node, dict | list):
        yield path, node
    for key, value in _items(node):
        yield from leaves(value, f"{path}.{key}" if path else f"{key}")


def check_leaves(config: dict[str, Any]) -> None:
    """Raises ``UserError`` for a secret, which would be written to config.yaml and with every checkpoint, and for an
    interpolation that came out of one: resolved once more, it could become a node that nobody has checked."""
    known = secrets()
    for path, value in leaves(config):
        secret = held(path, known) or held(str(value), known)
        if secret:
            raise UserError(f"{path}: holds {secret}; no key takes a secret, set it in the environment alone")
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{path}={value!r}: a value can't hold '${{', the mark of an interpolation")


def check_node(path: str, node: dict[str, Any], trusted: list[str]) -> None:
    """Bind the node's keys against the signature of its target, and their values against its annotations."""
    target = locate(path, node["_target_"], partial=bool(node.get("_partial_")), trusted=trusted)
    parameters = {in_yaml(name): p for name, p in inspect.signature(target).parameters.items()}
    annotated: Any = target  # a dataclass names its types itself, another class those of its constructor
    if isinstance(target, type) and not is_dataclass(target):
        annotated = target.__init__  # type: ignore[misc]
    hints = {in_yaml(name): hint for name, hint in get_type_hints(annotated, include_extras=True).items()}
    for key, value in node.items():
        if key in HYDRA_KEYS:
            continue
        if key not in parameters or key in RUNTIME_ARGUMENTS:
            allowed = set(parameters) - RUNTIME_ARGUMENTS
            raise UserError(
                f"{path}: {target.__name__} has no {key!r}{_owner(path, key) or did_you_mean(key, allowed)}"
            )
        if key in hints:
            check_value(f"{path}.{key}", value, hints[key])
    if not node.get("_partial_"):
        for key, parameter in parameters.items():
            if parameter.default is inspect.Parameter.empty and key not in node:
                raise UserError(f"{path}.{key} is missing: {target.__name__} needs it")


def in_yaml(name: str) -> str:
    """A parameter's key in YAML: one that would be a word of Python (``async``) has an underscore behind it there."""
    return name[:-1] if iskeyword(name[:-1]) else name


def _owner(group: str, key: str) -> str | None:
    """Which other choice of a group has this key."""
    for file in sorted((conf_dir() / group).glob("*.yaml")):
        if key in OmegaConf.load(file):
            return f"; it is a key of {group}={file.stem}"
    return None


def check_value(key: str, value: Any, hint: Any) -> None:
    try:
        TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        reasons = dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in error.errors(include_url=False))
        shown = "null" if value is None else f"{value!r}"
        raise UserError(f"{key}={shown}: {' or '.join(reasons)}") from None


def check_options(prefix: str, options: Any) -> None:
    """The fields of a dataclass against their types. Raises ``UserError`` that calls them ``<prefix>.<field>``."""
    for key, hint in get_type_hints(type(options), include_extras=True).items():
        check_value(f"{prefix}.{key}", getattr(options, key), hint)


def check_here(config: dict[str, Any]) -> None:
    """Ask the parts that can't work everywhere whether they can work here."""
    from hydra.utils import instantiate

    instantiate(config["precision"], _convert_="all").check("cuda" if gpu_visible() else "cpu")
    for name, sink in (config.get("sink") or {}).items():
        if hasattr(locate(f"sink.{name}", sink["_target_"], trusted=config["allow_targets"]), "check"):
            instantiate(sink, _convert_="all").check()


def gpu_visible() -> bool:
    """Whether this process may use a GPU, told by the driver's files and the usual variables, without importing torch."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if variable in os.environ:
            return any(d.strip() not in ("", "-1") for d in os.environ[variable].split(","))
    return any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))
