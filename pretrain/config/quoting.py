"""Quote paths and names on the command line: ``output_dir=runs/книги``, ``dataset.nameOrPath=data/lang=de``.

Hydra's grammar allows such characters only inside quotes. This module adds the quotes to the values of keys that are paths
or names. A value that already has a meaning in Hydra's grammar keeps it.
"""

from __future__ import annotations

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

PATH_KEYS = {"output_dir", "sweep_dir", "model_name", "resume", "nameOrPath", "name_or_path", "tokenizer_name"}
NAME_KEYS = {
    "name",
    "pattern",
    "subset",
    "split",
    "revision",
    "text_column",
    "text_template",
    "where",
    "best_by",
    "metric",
    "choose",
}
NAME_KEYS |= {"project", "entity", "group", "notes"}  # keys of sink.wandb
HYDRA_KEYS = {"hydra.sweep.dir", "hydra.launcher.folder"}
ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")  # the escapes of Hydra's grammar
# A list of places: `[a.txt, b/]`. `[ab]` is a glob with a set of characters.
LIST = re.compile(r"""\[([^\[\]]*[,/.'"][^\[\]]*)\]""", re.DOTALL)
ITEM = re.compile(r"""\s*('[^']*'|"[^"]*"|[^,]*[^,\s])\s*(?:,|$)""")
CAST = re.compile(r"(str|json_str|int|float|bool)\(.*\)", re.DOTALL)


def quoted_word(word: str, *, sweeping: bool) -> str:
    """Return ``key=value`` with quotes around a path or name that Hydra would not read as it is.

    Values that stay unchanged are ``null``, quoted values, interpolations (``${…}``), escapes (``\\,``), casts (``str(1)``)
    and, in a sweep, ``a,b`` and ``choice(a,b)``. The value of ``nameOrPath`` may be a list.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if not (name in HYDRA_KEYS or name.rpartition(".")[2] in PATH_KEYS | NAME_KEYS) or not value:
        return word
    if name.rpartition(".")[2] == "nameOrPath" and (several := LIST.fullmatch(value)):
        return f"{key}{equals}{_quoted_list(value, several[1])}"
    return f"{key}{equals}{_quoted_value(value, sweeping=sweeping)}"


def quoted(text: str) -> str:
    """Return ``text`` as a quoted string of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def unquoted(value: str) -> str:
    """Return the text that the value of an override stands for."""
    parsed = _parsed(value)
    return value if parsed is None else str(parsed.value())


def _quoted_value(value: str, *, sweeping: bool) -> str:
    parsed = _parsed(value)
    if parsed is not None and _keeps_its_meaning(value, parsed, sweeping=sweeping):
        return value
    if parsed is None and sweeping and not re.search(r"[\[\](){}'\"\\]", value):
        return ",".join(_quoted_value(part, sweeping=False) if part else part for part in value.split(","))
    return quoted(value)


def _quoted_list(value: str, inner: str) -> str:
    """Return a list of paths in which each one is quoted, unless Hydra reads it as a list of texts already."""
    parsed = _parsed(value)
    found = parsed.value() if parsed is not None and not parsed.is_sweep_override() else None
    if isinstance(found, list) and all(isinstance(item, str) for item in found):
        return value
    items = []
    for item in (item.strip() for item in ITEM.findall(inner)):
        text = _parsed(item)
        given = text.value() if text is not None else item
        items.append(quoted(given if isinstance(given, str) else item))
    return f"[{', '.join(items)}]" if items else quoted(value)


def _parsed(value: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None


def _keeps_its_meaning(value: str, parsed: Override, *, sweeping: bool) -> bool:
    if parsed.is_sweep_override():
        return sweeping
    found: Any = parsed.value()
    is_quoted = isinstance(found, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if found is None or found == value or is_quoted:
        return True
    return "${" in value or bool(ESCAPE.search(value) or CAST.fullmatch(value))
