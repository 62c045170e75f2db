"""Mistakes in the YAML files of a folder of --config-dir that show only in the config that is composed from them."""

from __future__ import annotations

import re
from typing import Any

from pretrain.config.choices import choice_files
from pretrain.config.defaults import conf_dir
from pretrain.config.trust import MULTI_SELECT, NESTED_PARTS, PARTS, SOURCE
from pretrain.config.yaml_file import read_yaml
from pretrain.runtime.errors import UserError


def check_own_places(path: str, node: Any, config_dir: str | None) -> None:
    """Raise ``UserError`` for the file of ``config_dir`` that was chosen for a place of a dataset at or below ``path``, such as
    replay.source, and has no ``_target_``."""
    if not isinstance(node, dict):
        return
    places = (place for place, base in NESTED_PARTS.items() if base in (PARTS["dataset"], SOURCE))
    if "_target_" not in node and re.fullmatch("|".join(places), path):
        check_own_files("dataset", node, config_dir, place=path)
    for key, value in node.items():
        check_own_places(f"{path}.{key}", value, config_dir)


def check_own_files(group: str, node: dict[str, Any], config_dir: str | None, *, place: str = "") -> None:
    """Raise ``UserError`` for the file of ``config_dir`` to which a group's ``node``, or that of a ``place``, owes what is no
    part: keys without a ``_target_``, or keys that are not nested under a name in a group that is a list of parts."""
    shipped = conf_dir() / group
    files = [file for file in choice_files(group, config_dir) if file.parent != shipped] if config_dir else []
    for file in files:
        content = read_yaml(file)
        keys = {key for key in content if key != "defaults"} if isinstance(content, dict) else set()
        if not keys or not keys <= set(node):
            continue  # not chosen
        if group not in MULTI_SELECT:
            if "_target_" not in keys and not (place and "defaults" in content):
                word = f"{group}@{place}" if place else group
                raise UserError(f"{file}: has no _target_, the class or function that {word}={file.stem} stands for")
            continue
        for key in keys:
            part = content[key]
            if not isinstance(part, dict):
                raise UserError(
                    f"{file}: its keys must be nested under a name, '{file.stem}: {{_target_: …}}', because {group}=[…] is a "
                    "list of parts"
                )
            if "_target_" not in part:
                raise UserError(f"{file}: {key} has no _target_, the class that it stands for")
