"""List the choices of the config groups: all YAML files, and those that conf/config.yaml chooses by default.

A folder of --config-dir adds choices to the shipped groups, and groups of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pretrain.config.defaults import conf_dir
from pretrain.runtime.errors import UserError


def choices(group: str, config_dir: str | None = None) -> list[str]:
    """Return the names of a group's YAML files."""
    return [file.stem for file in choice_files(group, config_dir)]


def choice_files(group: str, config_dir: str | None = None) -> list[Path]:
    """Return a group's YAML files by name. A file of ``config_dir`` can't replace a shipped one."""
    files = [file for folder in _folders(config_dir) for file in sorted((folder / group).glob("*.yaml"))]
    by_name = {file.stem: file for file in reversed(files)}
    return [by_name[name] for name in sorted(by_name)]


def groups(config_dir: str | None = None) -> list[str]:
    """Return the names of the groups that have a folder."""
    folders = [entry for folder in _folders(config_dir) for entry in os.scandir(folder) if entry.is_dir()]
    return sorted({entry.name for entry in folders} - {"schemas", "local"})


def own_groups(config_dir: str | None) -> set[str]:
    """Return the groups that only ``config_dir`` has."""
    return set(groups(config_dir)) - set(groups()) if config_dir else set()


def folder_of(config_dir: str) -> Path:
    """Return the folder that ``--config-dir`` names. Raises ``UserError`` where there is none, or it can't be read."""
    folder = os.path.abspath(os.path.expanduser(config_dir))
    if not os.path.isdir(folder):
        raise UserError(f"--config-dir={config_dir}: no such folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"--config-dir={config_dir}: can't be read; its permissions exclude this user")
    return Path(folder)


def _folders(config_dir: str | None) -> list[Path]:
    return [conf_dir()] + ([folder_of(config_dir)] if config_dir else [])


def default_choices(group: str) -> list[str]:
    """Return the choices of a group in the defaults list of conf/config.yaml."""
    return [choice for of, choice in chosen() if of == group]


def chosen() -> Iterator[tuple[str, str]]:
    """Yield (group, choice) for each entry of the defaults list."""
    text = (conf_dir() / "config.yaml").read_text().split("\n\n", 1)[0]
    for group, choices in re.findall(r"^  - (\w+): (.+)$", text, re.MULTILINE):
        for choice in re.findall(r"[\w-]+", choices):
            yield group, choice
