"""What this program uses of Hydra's private parts (seen in hydra-core 1.3.2 and 1.3.8).

Hydra's public ``compose`` needs a global that a program which imports this package may be using, and its decorator ``main``
parses the command line and changes the logging. This program composes with Hydra's own class instead, and asks its parser for
the options. ``tests/test_internals.py`` fails when these names have moved or behave in another way.
"""

from __future__ import annotations

from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.plugins import Plugins

__all__ = [
    "BASIC_LAUNCHER",
    "BASIC_SWEEPER",
    "Callbacks",
    "ConfigLoaderImpl",
    "FileSource",
    "Hydra",
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


def use_file_source(source: type[FileSource]) -> None:
    """Make Hydra read YAML files with ``source``."""
    Plugins.instance()  # its first use registers Hydra's own sources, one of which this one replaces
    SourcesRegistry.instance().types["file"] = source


def register_plugins(*plugins: type) -> None:
    """Make sweepers and launchers known to Hydra as ``hydra_plugins.pretrain.<class name>``; Hydra accepts only plugins of the
    package ``hydra_plugins``."""
    for plugin in plugins:
        Plugins.instance().class_name_to_class[f"hydra_plugins.pretrain.{plugin.__name__}"] = plugin
