"""Give a part another class with one word: ``optimizer._target_=mylab.Lion``.

The config then still holds the keys that a YAML file has set for another class. Those that the new class can't take are
dropped; all others, such as a misspelt key of the command line, stay for `check` to report.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from pretrain.config.hydra_configs import files_of
from pretrain.config.trust import MOVED, base_of, command_line_only_values, locate
from pretrain.runtime.errors import UserError


def drop_inherited_keys(config: DictConfig, loader: ConfigLoader, words: list[str]) -> None:
    """Remove from ``config``, in place, the keys that a file has set for another class than the present one.

    A subclass keeps the keys that it takes. An unrelated class keeps those among them that refer to other keys, such as
    ``lr: ${lr}``: these are settings of the run, and a constant is a setting of the class. ``betas`` gets the two keys
    ``beta1`` and ``beta2``. A key on the command line, or one whose value another file has changed, is never removed.

    Args:
        config: The config that ``words`` compose, with unresolved interpolations.
        loader: Hydra's loader, which has composed it.
        words: The overrides. Only they may say which packages are trusted, because inspecting a class imports it.
    """
    if not any("_target_" in word or word.lstrip("+").startswith("allow_targets=") for word in words):
        return
    trusted = command_line_only_values(words).get("allow_targets") or []
    spoken = set(_spoken(words))
    files = files_of(loader, words)
    for path, node in list(_parts(OmegaConf.to_container(config))):
        others = [other for package, content in files if (other := _of_other_target(package, content, path, node))]
        if not others:
            continue
        inherited = {key for other in others for key, value in other.items() if node.get(key) == value}
        inherited -= {"_target_", "_partial_", *(key for key in node if f"{path}.{key}" in spoken)}
        try:
            found, *olds = (locate(path, n["_target_"], base_of(path), trusted=trusted) for n in (node, *others))
            parameters = inspect.signature(found).parameters
        except (UserError, ValueError, TypeError):  # `check` reports it
            continue
        with open_dict(config):
            is_subclass = any(_is_subclass(found, old) for old in olds)
            _drop(OmegaConf.select(config, path), node, inherited, set(parameters), is_subclass=is_subclass)


def _spoken(words: list[str]) -> Iterator[str]:
    """Yield the dotted keys that ``words`` set, those in a word such as ``optimizer={eps: 1}`` too."""
    for override in OverridesParser.create().parse_overrides(words):
        nodes = [(override.key_or_group, override.value())]
        for path, value in nodes:
            yield path
            nodes += [(f"{path}.{key}", item) for key, item in value.items()] if isinstance(value, dict) else []


def _drop(
    part: DictConfig, node: dict[str, Any], inherited: set[str], parameters: set[str], *, is_subclass: bool
) -> None:
    if "betas" in parameters - set(node) and {"beta1", "beta2"} <= inherited:
        part["betas"] = [node["beta1"], node["beta2"]]
    for key in inherited:
        if key not in parameters or not (is_subclass or "${" in str(node[key])):
            del part[key]


def _parts(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dotted path and the node of every part in a plain config."""
    if not isinstance(node, dict):
        return
    if isinstance(node.get("_target_"), str):
        yield path, node
    for key, value in node.items():
        if path or key != "hydra":
            yield from _parts(value, f"{path}.{key}" if path else str(key))


def _of_other_target(package: str, content: Any, path: str, node: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a file has at ``path`` if it is a part of another class than ``node``."""
    if package and path != package and not path.startswith(f"{package}."):
        return None
    for key in path.removeprefix(package).strip(".").split(".") if path != package else ():
        content = content.get(key) if isinstance(content, dict) else None
    target = content.get("_target_") if isinstance(content, dict) else None
    return content if isinstance(target, str) and MOVED.get(target, target) != node["_target_"] else None


def _is_subclass(found: Any, other: Any) -> bool:
    return isinstance(found, type) and isinstance(other, type) and issubclass(found, other)
