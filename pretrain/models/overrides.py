"""``model.overrides`` of a pretrained model: other values of its config for the same weights, such as RoPE scaling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pretrain.runtime.errors import UserError, did_you_mean

OLD_CONFIG_KEYS = {"rope_theta", "rope_scaling", "torch_dtype"}  # transformers still accepts them and renames them
ROPE_KEYS = ("rope_scaling", "rope_parameters")  # the first is the name before transformers 5
SCALINGS = ("linear", "dynamic", "yarn", "llama3", "longrope", "default")
DEFAULTS = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}  # as Llama 3.1 has them
KEPT = ("rope_theta", "partial_rotary_factor")
POSITIONS, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"


def overridden(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with ``overrides``. Mappings are merged. RoPE scaling by a factor multiplies the
    model's positions, unless these are overridden too; ``dynamic`` needs the original number in the config.

    Raises ``UserError`` for RoPE scaling that transformers does not have, or that lacks its factor.
    """
    if not overrides:
        return config
    if overrides.get("model_type", config.get("model_type")) != config.get("model_type"):
        raise UserError("model.overrides.model_type: the weights are those of another model")
    given = {key: value for key, value in overrides.items() if key not in ROPE_KEYS}
    result = _merged(config, given)
    scaling = {**(overrides.get("rope_parameters") or {}), **(overrides.get("rope_scaling") or {})}
    if not scaling:
        return result
    old = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind, factor = _checked(scaling)
    original = old.get(ORIGINAL) or config.get(POSITIONS)
    rope = {key: old[key] for key in KEPT if key in old} | DEFAULTS.get(kind, {}) | scaling
    rope.pop("type", None)
    rope["rope_type"] = kind
    if isinstance(original, int) and kind != "default":
        if kind != "linear":
            rope.setdefault(ORIGINAL, original)
        if POSITIONS not in given:
            result[POSITIONS] = original if kind == "dynamic" else int(original * factor)
    for key in ROPE_KEYS:
        result.pop(key, None)
    return result | {"rope_parameters": rope}


def positions(config: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` with the number of positions that it allows: dynamic RoPE scaling is for longer texts than its config
    says."""
    rope = config.get("rope_parameters") or {}
    limit = config.get(POSITIONS)
    if rope.get("rope_type") != "dynamic" or not isinstance(limit, int):
        return config
    return config | {POSITIONS: int(limit * rope.get("factor", 1.0))}


def _checked(scaling: dict[str, Any]) -> tuple[str, float]:
    """Return the kind of RoPE scaling and its factor."""
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind not in SCALINGS:
        raise UserError(
            f"model.overrides.rope_scaling.rope_type={kind!r}: one of {', '.join(SCALINGS)}{did_you_mean(str(kind), SCALINGS)}"
        )
    if kind == "default" or (kind == "longrope" and factor is None):
        return kind, 1.0
    if not isinstance(factor, int | float) or isinstance(factor, bool) or factor < 1:
        raise UserError(f"model.overrides.rope_scaling.factor={factor!r}: a number of at least 1 is needed, e.g. 4.0")
    return kind, float(factor)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {k: v for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **top, **{key: _merged(base[key], value) for key, value in both.items()}}


def default_keys(model_type: str) -> set[str]:
    """Return all keys that a config of this type may have, including their old names."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    return {*config.to_dict(), *config.attribute_map}


def check_overrides(spec: Any, kind: str, *, known: bool) -> None:
    """Raise ``UserError`` for overrides of a pretrained model ``spec`` that its config does not have or that change its weights.
    ``kind`` is its type; ``known``: transformers has it."""
    if known:
        keys = default_keys(kind)
        check_known(spec.overrides, keys | (OLD_CONFIG_KEYS if "rope_parameters" in keys else set()), kind)
    check_shapes(_shapes(replace(spec, overrides={})), _shapes(spec), spec.overrides)


def _shapes(spec: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a model needs."""
    import torch

    return {n: tuple(t.shape) for n, t in spec.build_on_meta(param_dtype=torch.float32).hf_state().items()}


def check_known(overrides: dict[str, Any], known: set[str], kind: str) -> None:
    """Raise ``UserError`` for a key that the config of a model of this ``kind`` does not have."""
    for key in overrides:
        if key not in known:
            raise UserError(f"model.overrides: {kind} has no {key!r}{did_you_mean(key, known)}")


def check_shapes(
    plain: dict[str, tuple[int, ...]], changed: dict[str, tuple[int, ...]], overrides: dict[str, Any]
) -> None:
    """Raise ``UserError`` if a model with ``overrides`` needs weights of other names or shapes than the ``plain`` one has."""
    wrong = [name for name in dict.fromkeys([*plain, *changed]) if plain.get(name) != changed.get(name)]
    if wrong:
        name, keys = wrong[0], ", ".join(overrides)
        shapes = f"{_shape(plain.get(name))} → {_shape(changed.get(name))}"
        raise UserError(
            f"model.overrides ({keys}) changes the shapes of the weights, which are read from files: {name}: {shapes}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + ("; more tokens: transform=[vocabulary]" if "vocab_size" in overrides else "")
            + ("; more blocks: transform=[expand]" if "num_hidden_layers" in overrides else "")
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
