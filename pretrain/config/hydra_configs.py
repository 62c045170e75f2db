"""Compose configs with Hydra from the shipped folder of YAML files and an optional second folder, executing nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pretrain.config.choices import folder_of
from pretrain.config.hydra_internals import FileSource, Hydra, PlacesLoader, create_config_search_path, use_file_source
from pretrain.config.interpolation import bounded_interpolation
from pretrain.config.yaml_file import checked_text, read_yaml
from pretrain.runtime.errors import UserError


class CheckedFileSource(FileSource):
    """A config source that checks each file's size and syntax before it is read; a file may come from another person.

    A text is parsed once in a process: every job of a sweep is composed from the same files, and PyYAML is slow.
    """

    _parsed: ClassVar[dict[tuple[str, ...], ConfigResult]] = {}

    def load_config(self, config_path: str) -> ConfigResult:
        file = self.file(config_path)
        key = (self.provider, self.path, config_path, checked_text(file))
        if key not in self._parsed:
            try:
                self._parsed[key] = super().load_config(config_path)
            except Exception as error:
                raise UserError(f"{file}: can't be read as YAML: {' '.join(str(error).split())}") from None
        return copy.deepcopy(self._parsed[key])


_composed: ContextVar[dict[Any, DictConfig] | None] = ContextVar("_composed", default=None)


@contextmanager
def composing_once() -> Iterator[None]:
    """Compose the same words of the same folders only once within the block, in which no file changes: a command line is
    checked, shown and run with one config."""
    token = _composed.set({})
    try:
        yield
    finally:
        _composed.reset(token)


class ComposingHydra(Hydra):
    """A Hydra that keeps what it has composed within a block of `composing_once`."""

    def compose_config(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *arguments: Any, **options: Any
    ) -> DictConfig:
        known = _composed.get()
        folders = [path.path for path in self.config_loader.get_search_path().get_path()]
        validated = options.get("validate_sweep_overrides", True)
        key = (*folders, config_name, *overrides, run_mode, validated)
        if known is None or arguments or options.get("with_log_configuration"):
            return super().compose_config(config_name, overrides, run_mode, *arguments, **options)
        if key not in known:
            known[key] = super().compose_config(config_name, overrides, run_mode, **options)
        return copy.deepcopy(known[key])


@contextmanager
def composing(conf: Path, config_dir: str | None, kind: type[Hydra] = ComposingHydra) -> Iterator[Hydra]:
    """Yield a ``kind`` of Hydra that composes from ``conf`` first, and then from the folder of ``--config-dir``.

    A file in ``config_dir`` can add a choice to a group but can't replace a shipped one. Raises ``UserError`` where
    ``config_dir`` is not a folder.
    """
    use_file_source(CheckedFileSource)
    search = create_config_search_path(str(conf))
    if config_dir is not None:
        search.prepend("command-line", f"file://{folder_of(config_dir)}", anchor=SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        hydra = kind.create_main_hydra2("pretrain", search)
        hydra.config_loader = PlacesLoader(search)
        yield hydra
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def plain_mistakes() -> Iterator[None]:
    """Turn any exception of a composition into a ``UserError``, ``HydraException`` or ``OmegaConfBaseException``.

    Composing executes nothing, so every exception of Hydra or OmegaConf is caused by a mistake in a word or a file.
    """
    try:
        with bounded_interpolation():
            yield
    except (UserError, HydraException, OmegaConfBaseException):
        raise
    except RecursionError:
        raise UserError("nested too deeply for a config") from None
    except Exception as error:  # Hydra raises many types, for example ValueError for a senseless group override
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from None


def compose_config(
    hydra: Hydra, words: list[str], mode: RunMode, *, validate_sweep_overrides: bool = True
) -> DictConfig:
    """Return the config composed from conf/config.yaml and ``words``. It raises the exceptions of `plain_mistakes`."""
    with plain_mistakes():
        try:
            return hydra.compose_config("config", words, mode, validate_sweep_overrides=validate_sweep_overrides)
        except MissingConfigException as error:  # Hydra omits the choices of a group with several
            error.options = error.options or options_of(hydra, str(error.missing_cfg_file).rpartition("/")[0])
            raise


def options_of(hydra: Hydra, group: str) -> list[str]:
    """Return the choices of a group; an unknown group has none."""
    found: Any = hydra.config_loader.get_group_options(group)
    return list(found)


def files_of(loader: ConfigLoader, words: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the YAML files from which ``words`` compose a config, in the order in which they are merged.

    Each is the dotted key under which the file is placed, and its content with unresolved interpolations. Hydra's own files
    are left out.
    """
    with plain_mistakes():
        merged = loader.compute_defaults_list("config", words, RunMode.RUN).defaults
    folders = [
        Path(p.path.removeprefix("file://")) for p in loader.get_search_path().get_path() if p.provider != "hydra"
    ]
    found = []
    for entry in merged:
        file = next((file for folder in folders if (file := folder / f"{entry.config_path}.yaml").is_file()), None)
        content = read_yaml(file) if file is not None else None
        if isinstance(content, dict):
            found.append((entry.package or "", content))
    return found
