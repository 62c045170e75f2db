"""English prose from the files of every Python installation: docstrings, package descriptions and the topics of ``help()``.
Code examples are removed, because code is the other domain."""

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
    """Yield the docstrings of one module in sections of at most ``size`` characters. A regular expression finds them, 20 times
    as fast as a parser; over numpy, pandas, sympy, networkx and datasets it found the same text as ``ast`` up to 1–10 %."""
    found = []
    for match in TRIPLE_QUOTED.finditer(source):
        line_start = source.rfind("\n", 0, match.start()) + 1
        if source[line_start : match.start()].strip() in ("", "r", "R"):
            text = without_code(inspect.cleandoc(match[2]))
            if len(text) >= MIN_CHARS:
                found.append(text)
    yield from sections("\n\n\n".join(found), size)


def package_description(metadata: str, size: int) -> Iterator[str]:
    """Yield the long description of a METADATA file, which follows the first empty line."""
    yield from sections(without_code(metadata.partition("\n\n")[2]), size)


def topics(source: str) -> Iterator[str]:
    """Yield the texts of ``pydoc_data/topics.py``, which defines a dict of them."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (without_code(str(text)) for text in ast.literal_eval(node.value).values())


def without_code(text: str) -> str:
    """Return ``text`` without doctests and fenced code blocks."""
    return BLANK_LINES.sub("\n\n", DOCTEST.sub("", FENCED.sub("", text))).strip()
