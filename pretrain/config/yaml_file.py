"""Read YAML that another person may have written, as plain values and within limits.

A file of a few hundred bytes can expand to gigabytes by aliases of aliases, or exhaust Python's stack by nesting. The limits
are checked on the parser's events, before any object is built.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from pretrain.runtime.errors import UserError, one_line

MAX_BYTES = 2**20  # size of a file
MAX_DEPTH = 50  # nested mappings and lists
MAX_VALUES = 100_000  # values after expansion of the aliases


def read_yaml(file: Path, *, name: str | None = None) -> Any:
    """Return the content of ``file`` as plain values, as OmegaConf reads it (1e-4 is a number); interpolations stay text.

    Raises ``UserError``, in which the file is called ``name``, where it can't be read, is not YAML or exceeds the limits.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    text = checked_text(file, name=name)
    try:
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text))) if text.strip() else None
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{name or file}: can't be read as YAML: {one_line(error, lines=None)}") from None


def checked_text(file: Path, *, name: str | None = None) -> str:
    """Return the text of a YAML file. Raises ``UserError`` where the file exceeds the limits or is not YAML."""
    shown_name = name or str(file)
    try:
        if not file.is_file() and file.exists():
            raise UserError(f"{shown_name}: not a file")
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{shown_name}: no such file") from None
    except OSError as error:
        raise UserError(f"{shown_name}: can't be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8; a path with a null byte
        raise UserError(f"{shown_name}: can't be read as YAML: {error}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{shown_name}: larger than {MAX_BYTES // 2**20} MiB, the limit for a config")
    check_limits(text, shown_name)
    return text


def check_limits(text: str, shown_name: str) -> None:
    """Raise ``UserError`` for text that is nested too deeply, has too many values after expansion, or is not YAML."""
    import yaml

    known: dict[str, int] = {}  # anchor → number of values in its node
    open_nodes: list[tuple[str | None, int]] = []  # anchor of an open node, and the number of values before it
    values = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in known:  # undefined, or an alias inside its own node
                    raise UserError(
                        f"{shown_name}:{line}: *{event.anchor} refers to nothing that is complete before it"
                    )
                values += known[event.anchor]
            elif isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, values))
                values += 1
            elif isinstance(event, yaml.ScalarEvent):
                values += 1
                if event.anchor:
                    known[event.anchor] = 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = open_nodes.pop()
                if anchor:
                    known[anchor] = values - before
            if len(open_nodes) > MAX_DEPTH:
                raise UserError(f"{shown_name}:{line}: nested more than {MAX_DEPTH} deep, the limit for a config")
            if values > MAX_VALUES:
                raise UserError(f"{shown_name}:{line}: more than {MAX_VALUES} values, the limit for a config")
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{shown_name}: can't be read as YAML: {one_line(error, lines=None)}") from None
