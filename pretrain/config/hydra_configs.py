"""Hydra, made to compose from our folder of YAML and from another one; nothing that it composes is executed here.

`Hydra`, `create_config_search_path` and `SourcesRegistry` are private to hydra-core (seen in 1.3.8).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.interpolation import bounded_interpolation
from pretrain.config.yaml_file import checked_text
from pretrain.runtime.errors import UserError


class CheckedFileSource(FileConfigSource):
    """Files of configs, each looked at before it is read: a stranger's YAML may be a bomb, or no YAML."""

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path, self._normalize_file_name(config_path))
        checked_text(file)
        try:
            return super().load_config(config_path)
        except Exception as error:
            raise UserError(f"{file}: can't be read as YAML: {' '.join(str(error).split())}") from None


@contextmanager
def composing(conf: Path, config_dir: str | None) -> Iterator[Hydra]:
    """The Hydra that composes from ``conf``, and from the folder of ``--config-dir`` after it: a file there can add a
    choice, but can't take the place of one of ours.

    Raises ``UserError`` for a ``config_dir`` that is no folder.
    """
    Plugins.instance()  # which registers Hydra's own sources at its first use
    SourcesRegistry.instance().types["file"] = CheckedFileSource
    search = create_config_search_path(str(conf))
    if config_dir is not None:
        folder = os.path.abspath(os.path.expanduser(config_dir))
        if not os.path.isdir(folder):
            raise UserError(f"--config-dir={config_dir}: no such folder")
        search.prepend("command-line", f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2("pretrain", search)
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def plain_mistakes() -> Iterator[None]:
    """To compose executes nothing, so whatever Hydra or OmegaConf stumbles over is a mistake in a word or in a file. Raises
    ``UserError``, ``HydraException`` or ``OmegaConfBaseException`` for any exception."""
    try:
        with bounded_interpolation():
            yield
    except (UserError, HydraException, OmegaConfBaseException):
        raise
    except RecursionError:
        raise UserError("nested too deeply for a config") from None
    except Exception as error:  # of its words for a group override that makes no sense, ValueError is one of many
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from None


def compose_config(
    hydra: Hydra, words: list[str], mode: RunMode, *, validate_sweep_overrides: bool = True
) -> DictConfig:
    """What conf/config.yaml and ``words`` come to. Raises as `plain_mistakes` says."""
    with plain_mistakes():
        return hydra.compose_config("config", words, mode, validate_sweep_overrides=validate_sweep_overrides)


def options_of(hydra: Hydra, group: str) -> list[str]:
    """The choices of a group, where there is such a group."""
    found: Any = hydra.config_loader.get_group_options(group)
    return list(found)
