"""Decide whether two commands describe the same run: compare what a checkpoint recorded with the present config."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.schema import read_state
from pretrain.config.schema import RootKeys
from pretrain.config.trust import PARTS
from pretrain.run.leftovers import LATER_KEYS, read_config, with_later_keys
from pretrain.runtime.errors import UserError
from pretrain.runtime.places import absolute, each
from pretrain.runtime.strict_json import read_json

FIXED = {  # part of a run's identity → the config keys that determine it
    "model": ("model_name", "model"),
    "tokenizer": ("model_name", "model"),
    "data": ("dataset", "replay", "phases"),
    "sequence_length": ("sequence_length",),
    "global_batch": ("batch_size", "gradient_accumulation_steps", "devices"),
    "seed": ("seed",),
    "weights": ("precision",),
    "optimizer": ("optimizer",),
    "objective": ("objective",),
    "transforms": ("transform",),
}
FREE = {  # keys that may differ in a finished run; the product of the batch keys is compared before, as global batch
    *("name", "output_dir", "task", "resume", "resume_allow", "allow_targets", "devices", "strategy", "launch"),
    *("sweep", "sweep_dir"),
    *("batch_size", "gradient_accumulation_steps", "log_every", "evaluate_every", "save_every"),
    *("sink", "checkpoint", "evaluation", "generation", "guard", "telemetry"),
}

PLACES = ("model_name", "name_or_path", "tokenizer_name", "revision", "nameOrPath")  # keys that locate content

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


def check_same_run(
    checkpoint: Path, identity: dict[str, Any], config: RunConfig, *, model_config: dict[str, Any], files: str
) -> None:
    """Refuse to resume from a ``checkpoint`` that does not belong to the run which ``config`` describes.

    Args:
        checkpoint: The checkpoint from which the run resumes.
        identity: The identity of the present run, by part (see ``FIXED``).
        config: The present config.
        model_config: The model's present config.json.
        files: A description of the data files that have changed; empty where none has.

    Raises:
        UserError: The checkpoint belongs to a run with another model, tokenizer, data, sequence length, global batch,
            seed, weights, optimizer or transforms, so that it can't be continued exactly. The message lists old and new values.
    """
    state = read_state(checkpoint)
    before = {"transforms": [], "objective": None} | state["identity"]  # checkpoints of earlier versions have none
    changed = [p for p in FIXED if before.get(p) != identity[p]]
    if _phases_until(state, before) != _phases_until(state, identity):
        changed = list(dict.fromkeys([*changed, "data"]))
    changed = [p for p in changed if p not in config.resume_allow]
    if not changed:
        return
    earlier = read_config(checkpoint)
    new = config.plain
    old = with_later_keys(earlier, new)
    reasons = []
    for part in changed:
        keys = [d for d in differences(old, new) if d.split(".")[0].split(":")[0] in FIXED[part]]
        why = " (the files have changed since the run started)" if part in ("model", "tokenizer", "data") else ""
        if part == "data" and files:
            keys.append(f"the data has changed since the run started: {files}")
        if part == "data" and not keys and "bos" not in (earlier.get("dataset") or {}):
            keys.append(
                f"{'; '.join(LATER_KEYS)}: the run started without BOS before documents; {LATER_KEYS[0]}=false continues it"
            )
        if part == "data" and before.get("mixture", []) != identity.get("mixture", []):
            keys.append(f"the mixture was {_mixture_of(before)} and is now {_mixture_of(identity)}")
        reasons += keys or [f"{part}: {before.get(part)} → {identity[part]}{why}"]
        if part == "model":
            reasons += changed_model_config(checkpoint, model_config)
    raise UserError(
        f"{checkpoint} can't be continued with other settings: {'; '.join(dict.fromkeys(reasons))}. "
        "Choose another output_dir, or resume=never to start over"
        f"{_resume_allow_hint(changed)}"
    )


def _phases_until(state: dict[str, Any], identity: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the phases of the mixture that began before the checkpoint with ``state``; later ones may still change."""
    phases: list[dict[str, Any]] = identity.get("mixture", [])
    return [phase for phase in phases if phase["first_sample"] <= state["progress"]["samples"]]


def _mixture_of(identity: dict[str, Any]) -> str:
    """Return the shares of the parts in each phase as text, such as ``[es 75.0%, code 25.0%; from step 40: es 100.0%]``."""
    texts = []
    for phase in identity.get("mixture", []):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in phase["shares"].items() if share)
        step = phase["first_sample"] // identity["global_batch"]
        texts.append(f"from step {step:,}: {shares}" if step else shares)
    return f"[{'; '.join(texts)}]" if texts else "one dataset alone"


def changed_model_config(checkpoint: Path, model_config: dict[str, Any]) -> list[str]:
    """Return the integers that differ between the model's config and the checkpoint's, formatted by ``differences``."""
    try:
        saved = read_json(checkpoint / "config.json")
    except (OSError, ValueError):
        return []
    if not isinstance(saved, dict):
        return []
    both = [key for key in model_config if key in saved and isinstance(saved[key], int)]
    return differences({key: saved[key] for key in both}, {key: model_config[key] for key in both})


def _resume_allow_hint(changed: list[str]) -> str:
    if "model" in changed or "transforms" in changed:  # other weights
        return ""
    return f"; or continue, no longer exactly, with resume_allow=[{','.join(changed)}]"


def check_finished_run(old: dict[Any, Any], config: RunConfig) -> None:
    """Raise ``UserError`` when the finished run with the config ``old`` had other settings than ``config``."""
    if changed := changed_settings(old, config.plain, same_content=True):
        raise UserError(
            f"output_dir={config.output_dir} holds a finished run with other settings: {'; '.join(changed)}. "
            "Choose another output_dir, or resume=never to start over"
        )


def changed_settings(old: dict[Any, Any], new: dict[str, Any], *, same_content: bool = False) -> list[str]:
    """Return the settings that differ between two configs, without those that may differ in a finished run.

    A group of the user's own is not compared: its values count where other keys refer to them. ``same_content`` means that
    model and data are known to be the same, so that their paths are not compared. Otherwise the paths are compared as absolute
    paths.
    """

    old = with_later_keys(old, new)

    def without_places(config: dict[Any, Any]) -> dict[Any, Any]:
        compared = {*(field.name for field in fields(RootKeys)), *PARTS} - FREE
        return {
            key: _with_comparable_path(key, value, same_content) for key, value in config.items() if key in compared
        }

    return differences(without_places(old), without_places(new))


def _with_comparable_path(key: Any, value: Any, same_content: bool) -> Any:
    if key == "attention" and value == "auto":
        return "sdpa"  # the default of earlier versions, which computes the same
    if isinstance(value, dict):
        return {k: _with_comparable_path(k, v, same_content) for k, v in value.items()}
    if key not in PLACES or not isinstance(value, str | list):
        return value
    if same_content:
        return None
    return absolute(value) if isinstance(value, str) else [absolute(place) for place in each(value)]


def differences(old: dict[Any, Any], new: dict[Any, Any], prefix: str = "") -> list[str]:
    """Return ``["lr: 0.1 → 0.2", …]`` with every leaf that differs, in the order of the new config."""
    found = []
    for key in dict.fromkeys([*new, *old]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} → {after}")
    return found
