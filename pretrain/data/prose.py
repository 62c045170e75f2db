"""English prose out of what every Python carries: docstrings, package descriptions, the topics of ``help()``. Code
examples are left out, because code is the other domain."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

from pretrain.data.reading.sections import sections

MIN_CHARS = 300  # shorter docstrings are mostly signatures and one-liners
TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
FENCED = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
DOCTEST = re.compile(r"^[ \t]*>>>.*?(?=^[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
BLANK_LINES = re.compile(r"\n\s*\n\s*\n+")


def docstrings(source: str, size: int) -> Iterator[str]:
    """The docstrings of one module. A regular expression instead of a parser: 20 times as fast, and over numpy, pandas,
    sympy, networkx and datasets it found the same text as ``ast`` within 1–10 %."""
    found = []
    for match in TRIPLE_QUOTED.finditer(source):
        line_start = source.rfind("\n", 0, match.start()) + 1
        if source[line_start : match.start()].strip() in ("", "r", "R"):
            text = without_code(inspect.cleandoc(match[2]))
            if len(text) >= MIN_CHARS:
                found.append(text)
    yield from sections("\n\n\n".join(found), size)


def package_description(metadata: str, size: int) -> Iterator[str]:
    """The long description of a METADATA file: what follows the first empty line."""
    yield from sections(without_code(metadata.partition("\n\n")[2]), size)


def topics(source: str) -> Iterator[str]:
    """The documents of ``pydoc_data/topics.py``, a dict of texts."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (without_code(str(text)) for text in ast.literal_eval(node.value).values())


def without_code(text: str) -> str:
    """``text`` without doctests and fenced blocks."""
    return BLANK_LINES.sub("\n\n", DOCTEST.sub("", FENCED.sub("", text))).strip()
