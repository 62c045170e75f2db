"""What a run was told: its configuration beside the shipped defaults, or beside that of other runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NAMES = ("name", "output_dir")  # always differ, and stand at the top of a page
ABSENT = "—"


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``("optimizer.lr", 0.001), …``: every leaf; a list is one."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing(configs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The keys in which not all ``configs`` agree, with what each says."""
    leaves = [dict(flat(config)) for config in configs]
    keys = dict.fromkeys(key for found in leaves for key in found if key not in NAMES)
    rows = [(key, [said(found[key]) if key in found else ABSENT for found in leaves]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def said(value: Any) -> str:
    """A value as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(said, value))}]"
    return repr(value) if (isinstance(value, str) and value != value.strip()) or value == "" else str(value)
