"""Compare the configuration of a run with the shipped defaults, or with the configurations of other runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NAMES = ("name", "output_dir")  # they always differ, and the head of the page shows them
ABSENT = "—"


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of ``config``, such as ``("optimizer.lr", 0.001)``. A list is one leaf."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing(configs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the keys in which ``configs`` differ, each with the values of all ``configs``."""
    leaves = [dict(flat(config)) for config in configs]
    keys = dict.fromkeys(key for found in leaves for key in found if key not in NAMES)
    rows = [(key, [as_yaml(found[key]) if key in found else ABSENT for found in leaves]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def as_yaml(value: Any) -> str:
    """Format a value as YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    return repr(value) if (isinstance(value, str) and value != value.strip()) or value == "" else str(value)
