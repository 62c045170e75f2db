"""Write the comments behind the keys of conf/, which `--help` prints, from the docstrings of the classes that have the keys.

    python scripts/make_comments.py

A class or a function documents its keys under ``Attributes:`` or ``Args:``, also those of its base classes. Lines of a YAML that
are comments only stay as they are. conf/hydra/ describes Hydra's own parts and is not touched.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pretrain.config.group_keys import GROUP_KEYS
from pretrain.config.schema import RootKeys

CONF = Path(__file__).parents[1] / "conf"
KEY = re.compile(r"^( *)(\w+):(?= |$)")
LONGEST = 40  # characters of a key and its value behind which comments are aligned
SECTION = re.compile(r"^(?:Attributes|Args):\n((?:    .*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^    (\w+): (.*\n(?:     +.*\n)*)", re.MULTILINE)


def field_docs(part: Any) -> dict[str, str]:
    """Return what the docstring of a class or a function, and those of its base classes, say of each key."""
    docs = {}
    for owner in reversed(getattr(part, "__mro__", [part])):
        text = inspect.cleandoc(owner.__dict__.get("__doc__") or "" if inspect.isclass(owner) else owner.__doc__ or "")
        for section in SECTION.findall(text + "\n"):
            docs |= {name.rstrip("_"): " ".join(doc.split()) for name, doc in ENTRY.findall(section)}
    return docs


def parts_of(file: Path) -> list[tuple[int, list[str], dict[str, str]]]:
    """Return the parts that a YAML describes: the indentation of their keys, these keys, and their documentation."""
    node = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(node, dict)
    if file == CONF / "config.yaml":
        return [(0, [key for key in node if key not in ("defaults", "hydra")], field_docs(RootKeys))]
    parts = []
    for indent, part in ((0, node), *((2, value) for value in node.values() if isinstance(value, Mapping))):
        if "_target_" in part:
            module, _, name = part["_target_"].rpartition(".")
            keys = [key for key in part if not key.startswith("_") and key not in ("defaults", "source")]
            shared = field_docs(GROUP_KEYS[group]) if (group := file.parent.name) in GROUP_KEYS else {}
            parts.append((indent, keys, field_docs(getattr(import_module(module), name)) | shared))
    return parts


def commented(file: Path) -> str:
    """Return the text of the YAML with the comments that it should have."""
    docs = {(indent, key): docs.get(key) for indent, keys, docs in parts_of(file) for key in keys}
    lines, aligned = [], []
    for line in file.read_text().splitlines():
        key = KEY.match(line)
        doc = docs.get((len(key[1]), key[2])) if key else None
        if doc is not None:
            line = re.sub(r" +# .*$", "", line)
            aligned.append(len(line))
        lines.append((line, doc))
    column = max((length for length in aligned if length <= LONGEST), default=0)
    return "".join(f"{line}\n" if doc is None else f"{line:<{column}}  # {doc}\n" for line, doc in lines)


def files() -> list[Path]:
    """Return the YAMLs of this program's own parts."""
    others = {"hydra", "schemas", "experiment", "local"}
    return sorted(file for file in CONF.rglob("*.yaml") if file.relative_to(CONF).parts[0] not in others)


if __name__ == "__main__":
    for file in files():
        file.write_text(commented(file))
