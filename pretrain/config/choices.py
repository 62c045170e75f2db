"""List the choices of the config groups: all YAML files, and those that conf/config.yaml chooses by default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pretrain.config.defaults import conf_dir


def choices(group: str) -> list[str]:
    """Return the names of a group's YAML files."""
    folder: Path = conf_dir() / group
    return sorted(file.stem for file in folder.glob("*.yaml"))


def default_choices(group: str) -> list[str]:
    """Return the choices of a group in the defaults list of conf/config.yaml."""
    return [choice for of, choice in chosen() if of == group]


def chosen() -> Iterator[tuple[str, str]]:
    """Yield (group, choice) for each entry of the defaults list."""
    text = (conf_dir() / "config.yaml").read_text().split("\n\n", 1)[0]
    for group, choices in re.findall(r"^  - (\w+): (.+)$", text, re.MULTILINE):
        for choice in re.findall(r"[\w-]+", choices):
            yield group, choice
