"""Translate the flat YAML of the original design into Hydra overrides, and generate its JSON schema.

One table maps every key to its meaning. A key that no longer has an effect is accepted with a one-line notice.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import OmegaConf
from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter

from pretrain.config.check import check_value, conf_dir, known_as
from pretrain.config.choices import choices, default_choices
from pretrain.config.quoting import quoted
from pretrain.config.schema import RootKeys
from pretrain.config.trust import COMMAND_LINE_ONLY, PARTS, locate
from pretrain.config.yaml_file import read_yaml
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, did_you_mean

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # lr_scheduler → choice of the scheduler group, other keys to set
    "constant": ("constant", {}),
    "linear": ("linear", {}),
    "cosine": ("cosine", {}),
    "fixed": ("constant", {"warmup_proportion": 0.0}),
    "warmup_constant": ("constant", {}),
    "warmup_linear": ("linear", {}),
    "warmup_cosine": ("cosine", {}),
    "warmup_cosine_restart": ("cosine", {"scheduler.cycles": 2}),
}
STRATEGIES = {name: name for name in choices("strategy")} | {"none": "single", "deep_speed": "deepspeed"}
SOURCES = {
    "local": "local",
    "huggingface": "huggingface",
    "hf": "huggingface",
    "sample": "sample",
    "mixture": "mixture",
}
ROUTED = {  # keys that belong to a strategy or a model, with the type of their values
    "zero_stage": int,
    "offload_optimizer": bool,
    "offload_parameters": bool,
    "auto_wrap_policy": str,
    "sharding_strategy": str,
    "cpu_offload": bool,
    "gradient_checkpointing": bool | Literal["selective"] | PositiveInt,
    "state_dict_type": Literal["full", "sharded"],
    "limit_all_gathers": bool,
    "static_graph": bool,
    "find_unused_parameters": bool,
    "backend": Literal["nccl", "gloo"],
}


@dataclass
class Flat:
    """The meaning of a flat file.

    Attributes:
        choices: Config group → choice.
        values: Dotted key → value.
        routed: Key → value, for the chosen strategy or the chosen model, the one that has such a key.
    """

    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    routed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """A flat key: the type of its values, and the function that applies a value to the meaning of the file."""

    hint: Any
    apply: Callable[[Flat, Any], None]


def _to(name: str) -> Callable[[Flat, Any], None]:
    return lambda flat, value: flat.values.update({name: value})


def _choose(group: str, names: dict[str, str]) -> Callable[[Flat, Any], None]:
    return lambda flat, value: flat.choices.update({group: names[value]})


def _route(name: str) -> Callable[[Flat, Any], None]:
    return lambda flat, value: flat.routed.update({name: value})


def _when(condition: Any, name: str, value: Any) -> Callable[[Flat, Any], None]:
    """Set ``name`` to ``value`` when the flat key has the value ``condition``."""
    return lambda flat, given: flat.values.update({name: value} if given == condition else {})


def _no_effect(key: str, reason: str) -> Callable[[Flat, Any], None]:
    return lambda flat, value: notice(f"{key}: has no effect: {reason}")


def _always(key: str, reason: str) -> Callable[[Flat, Any], None]:
    def apply(flat: Flat, value: bool) -> None:
        if not value:
            notice(f"{key}=false: has no effect: {reason}")

    return apply


def _scheduler(flat: Flat, value: str) -> None:
    choice, extra = SCHEDULERS[value]
    flat.choices["scheduler"] = choice
    flat.values.update(extra)


def _lr_decay(flat: Flat, value: bool) -> None:
    if not value:
        flat.choices["scheduler"] = "constant"
        flat.values.pop("scheduler.cycles", None)


def _accumulation(flat: Flat, value: bool) -> None:
    if not value and flat.values.get("gradient_accumulation_steps", 1) != 1:
        steps = flat.values["gradient_accumulation_steps"]
        raise UserError(f"gradient_accumulation=false with gradient_accumulation_steps={steps}: the steps must be 1")
    if not value:
        flat.values["gradient_accumulation_steps"] = 1


def _dataset(flat: Flat, value: dict[str, Any], place: str = "dataset") -> None:
    """Apply a dataset, also one at another ``place``: a part of a mixture, or the source of the replay."""
    if not isinstance(value, dict):
        raise UserError(f"{place}={value!r}: must be a mapping with source and nameOrPath")
    source = value.get("source", "local")
    if not isinstance(source, str) or source not in SOURCES:
        raise UserError(f"{place}.source={source!r}: not a source{did_you_mean(str(source), SOURCES)}")
    flat.choices["dataset" if place == "dataset" else f"dataset@{place}"] = SOURCES[source]
    for key, given in value.items():
        if key == "format":
            _no_effect(f"{place}.format", "the format is detected from the path")(flat, given)
        elif key == "parts" and isinstance(given, dict):
            for name, part in given.items():
                _dataset(flat, part, f"{place}.parts.{name}")
        elif key != "source":
            flat.values[f"{place}.{key}"] = given


def _replay(flat: Flat, value: dict[str, Any]) -> None:
    for key, given in value.items():
        if key == "source" and given is not None:
            _dataset(flat, given, "replay.source")
        else:
            flat.values[f"replay.{key}"] = given


def _strategy_config(flat: Flat, value: dict[str, Any]) -> None:
    known = ROUTED.keys() | {key for choice in choices("strategy") for key in _signature("strategy", choice, [])}
    for key in value:
        if key not in known:
            raise UserError(f"parallelization_config.{key}: no strategy has such a key{did_you_mean(str(key), known)}")
    flat.routed.update(value)


def _logging(flat: Flat, value: str | None) -> None:
    if value == "wandb":
        flat.choices["sink"] = f"[{','.join([*default_choices('sink'), 'wandb'])}]"


def _wandb(key: str) -> Callable[[Flat, Any], None]:
    """Set ``sink.wandb.<key>``. It has no effect without logging_config, which the table applies earlier."""

    def apply(flat: Flat, value: Any) -> None:
        if "sink" in flat.choices and value is not None:
            flat.values[f"sink.wandb.{key}"] = bool(value) if key == "log_model" else value
        elif value:
            notice(f"wandb {key}={value}: has no effect without logging_config: wandb")

    return apply


KEYS: dict[str, Key] = {
    "task": Key(
        Literal["pretraining", "clm_training", "tokenization", "evaluation", "generation", "export", "merge"],
        lambda flat, value: flat.values.update(task={"clm_training": "pretraining"}.get(value, value)),
    ),
    "experiment_name": Key(str, _to("name")),
    "precision": Key(
        Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true"],
        lambda flat, value: flat.choices.update(precision=value),
    ),
    "lr_scheduler": Key(Literal[tuple(SCHEDULERS)], _scheduler),
    "lr_decay": Key(bool, _lr_decay),
    "gradient_accumulation": Key(bool, _accumulation),
    "parallelization_strategy": Key(Literal[tuple(STRATEGIES)], _choose("strategy", STRATEGIES)),
    "parallelization_config": Key(dict[str, Any], _strategy_config),
    **{name: Key(hint, _route(name)) for name, hint in ROUTED.items()},
    "dataset": Key(dict[str, Any], _dataset),
    "replay": Key(dict[str, Any], _replay),
    "num_workers": Key(NonNegativeInt, lambda flat, value: flat.values.update({"dataset.num_workers": value or 1})),
    "train_data_ratio": Key(Annotated[float, Field(gt=0, le=1)], _to("dataset.train_data_ratio")),
    "validate_after_k_steps": Key(PositiveInt, _to("evaluate_every")),
    "validate_after_epoch": Key(bool, _when(True, "evaluation.per_epoch", 1)),
    "validations_per_epoch": Key(PositiveInt, _to("evaluation.per_epoch")),
    "validate_on_end": Key(bool, _always("validate_on_end", "the end is always evaluated")),
    "save_on_validate": Key(bool, _when(True, "checkpoint.with_evaluation", True)),
    "save_on_end": Key(bool, _always("save_on_end", "the end is always saved")),
    "checkpoint": Key(str | None, lambda flat, value: flat.values.update({"resume": value} if value else {})),
    "initial_weights_checkpoint": Key(
        str | None, lambda flat, value: flat.values.update({"model_name": value} if value else {})
    ),
    "verbose_level": Key(Annotated[int, Field(ge=1, le=4)], _to("sink.console.level")),
    "log_iter_interval": Key(PositiveInt, _to("log_every")),
    "log_every_n_steps": Key(PositiveInt, _to("log_every")),
    "logging_config": Key(Literal["none", "wandb"] | None, _logging),
    "wandb_project": Key(str | None, _wandb("project")),
    "wandb_entity": Key(str | None, _wandb("entity")),
    "wandb_run_name": Key(str | None, _wandb("name")),
    "log_model": Key(bool | str, _wandb("log_model")),
}
_FIRST_ROOT_KEY = len(KEYS)
for _name, _hint in get_type_hints(RootKeys, include_extras=True).items():
    if _name in COMMAND_LINE_ONLY:
        continue
    KEYS.setdefault(_name, Key(_hint, _to(_name)))


def overrides_from(file: Path, later: list[str]) -> list[str]:
    """Return the Hydra overrides of a flat YAML, followed by those of the command line (``later``), which take precedence.

    Raises ``UserError`` for a missing file, a file that is not a mapping, an unknown key (with the nearest known one), or a
    value of the wrong type.
    """
    flat = _read(file)
    chosen_later = {o.split("=", 1)[0].lstrip("+") for o in later if "=" in o}
    dropped = tuple(_place(group) for group in (*flat.choices, "sink") if group in chosen_later)
    keys_of = {group: _signature(group, flat.choices.get(group), later) for group in ("strategy", "model")}
    for key, value in flat.routed.items():
        owner = next((group for group, known in keys_of.items() if key in known), None)
        if owner is not None:
            flat.values[f"{owner}.{key}"] = value
        elif "strategy" not in dropped:
            notice(f"{key}: has no effect with strategy {flat.choices.get('strategy', 'single')}")
    choices = [f"{group}={choice}" for group, choice in flat.choices.items() if not _is_in(_place(group), dropped)]
    values = [f"++{key}={_quote(v)}" for key, v in flat.values.items() if not _is_in(key, dropped)]
    return choices + values + later


def _place(group: str) -> str:
    """Return the key that a choice of ``group`` fills: that of the group, or the place behind the @."""
    return group.rpartition("@")[2]


def _is_in(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _read(file: Path) -> Flat:
    content = read_yaml(file, name=f"--config {file}")
    if not isinstance(content, dict) or not content:
        raise UserError(f"--config {file}: not a YAML mapping of keys to values")
    flat = Flat()
    for name in sorted(content, key=_rank):
        if name not in KEYS:
            raise UserError(f"--config {file}: unknown key {name!r}{known_as(str(name), set(KEYS))}")
        check_value(str(name), content[name], KEYS[str(name)].hint)
        KEYS[str(name)].apply(flat, content[name])
    return flat


def _rank(name: Any) -> int:
    """Return the order of a key: root keys first, then the table's order, so that a key is applied after the one it refines.

    Unknown keys come before all others.
    """
    order = list(KEYS)
    return (order.index(name) - _FIRST_ROOT_KEY) % len(order) if name in KEYS else -1


def _signature(group: str, choice: str | None, later: list[str]) -> set[str]:
    """Return the keys of the part that the group chooses; a choice on the command line takes precedence."""
    for override in later:
        if override.startswith(f"{group}="):
            choice = override.split("=", 1)[1]
    file = conf_dir() / group / f"{choice or {'strategy': 'single', 'model': 'pretrained'}[group]}.yaml"
    if not file.exists():
        raise UserError(f"{group}={choice}: no such choice{did_you_mean(str(choice), choices(group))}")
    node = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(node, dict)
    return set(inspect.signature(locate(group, node["_target_"], PARTS[group])).parameters)


def _quote(value: Any) -> str:
    """Return a value in Hydra's override grammar, in which lists and numbers are written as in JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_quote(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_quote(v) for v in value) + "]"
    if isinstance(value, str):
        return quoted(value)
    return json.dumps(value)


def schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of the flat YAML, generated from the table that also reads it."""
    properties = {}
    for name, key in sorted(KEYS.items()):
        properties[name] = TypeAdapter(key.hint).json_schema()
    dataset = {"$ref": "#/properties/dataset"}
    properties["dataset"] = {
        "type": "object",
        "properties": {
            "source": {"enum": list(SOURCES)},
            "nameOrPath": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "format": {"enum": ["hf", "files"]},
            "parts": {"type": "object", "additionalProperties": dataset},
        },
    }
    properties["replay"] = {"type": "object", "properties": {"share": {"type": "number"}, "source": dataset}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The flat YAML of `python -m pretrain --config FILE.yaml`",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
