"""What this program uses of Hydra's private parts (seen in hydra-core 1.3.2 and 1.3.8).

Hydra's public ``compose`` needs a global that a program which imports this package may be using, and its decorator ``main``
parses the command line and changes the logging. This program composes with Hydra's own class instead, and asks its parser for
the options. ``tests/test_internals.py`` fails when these names have moved or behave in another way.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins

__all__ = [
    "BASIC_LAUNCHER",
    "BASIC_SWEEPER",
    "Callbacks",
    "ConfigLoaderImpl",
    "FileSource",
    "Hydra",
    "PlacesLoader",
    "create_config_search_path",
    "get_args_parser",
    "register_plugins",
    "use_file_source",
]

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class FileSource(FileConfigSource):
    """Hydra's source of YAML files."""

    def file(self, config_path: str) -> Path:
        """Return the file of a config, which Hydra names without its ending."""
        return Path(self.path, self._normalize_file_name(config_path))


class PlacesLoader(ConfigLoaderImpl):
    """Hydra's loader, in which ``group@place=choice`` also adds a place that no defaults list has.

    In Hydra, ``dataset@dataset.parts.es=local`` replaces the choice of an existing place, and ``+`` before it adds a place;
    each is an error where the other is meant. Here both do what is possible. The last word of a place counts.
    """

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], CachingConfigRepository]:
        words, repo = super()._parse_overrides_and_create_caching_repo(config_name, overrides)
        places = [i for i, word in enumerate(words) if _is_place(word, repo)]
        resolved = [word for i, word in enumerate(words) if i not in places]
        for i in places:
            listed = create_defaults_list(repo, config_name, resolved, prepend_hydra=True, skip_missing=True)
            is_default = words[i].package == words[i].key_or_group.replace("/", ".")  # dataset@dataset is dataset
            word = replace(words[i], package=None) if is_default else words[i]
            exists = word.get_key_element().lstrip("+") in listed.overrides.known_choices
            words[i] = replace(word, type=OverrideType.CHANGE if exists else OverrideType.ADD)
            resolved.append(words[i])
        return words, repo


def _is_place(word: Override, repo: Any) -> bool:
    """Return whether ``word`` chooses a file of a group for a place: ``group@place=choice``, with or without ``+``."""
    return (
        word.package is not None
        and word.type in (OverrideType.CHANGE, OverrideType.ADD)
        and not word.is_sweep_override()
        and not isinstance(word.value(), dict)
        and repo.group_exists(word.key_or_group)
    )


def use_file_source(source: type[FileSource]) -> None:
    """Make Hydra read YAML files with ``source``."""
    Plugins.instance()  # its first use registers Hydra's own sources, one of which this one replaces
    SourcesRegistry.instance().types["file"] = source


def register_plugins(*plugins: type) -> None:
    """Make sweepers and launchers known to Hydra as ``hydra_plugins.pretrain.<class name>``; Hydra accepts only plugins of the
    package ``hydra_plugins``."""
    for plugin in plugins:
        Plugins.instance().class_name_to_class[f"hydra_plugins.pretrain.{plugin.__name__}"] = plugin
