"""The templates of ``dataset.text_template``, such as ``{title}\\n\\n{body}``, which join columns into the text of a document.

A field is the name of a column and nothing else. The attributes, indices, conversions and format specifications of
``str.format`` are refused, so a template can't reach anything but the columns of a row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from string import Formatter
from typing import Any

from pretrain.runtime.errors import UserError

ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}  # a shell passes them as two characters
Parts = tuple[tuple[str, str | None], ...]  # text, and the column that follows it


class RefusedTemplate(ValueError):
    """Something that a template can't contain."""


def check_template(template: str) -> str:
    """Return ``template``. Raises ``RefusedTemplate`` if it is not one."""
    _parts(template)
    return template


@lru_cache(maxsize=64)
def template_parts(template: str) -> Parts:
    """Return the texts and columns of a template. Raises ``UserError`` for a field that is not the plain name of a column."""
    try:
        return _parts(template)
    except RefusedTemplate as error:
        raise UserError(f"dataset.text_template={template[:200]!r}: {error}") from None


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names."""
    return tuple(dict.fromkeys(name for _, name in template_parts(template) if name is not None))


def filled(template: str, row: Mapping[str, str | int | float | bool | None]) -> str | None:
    """Return the text of a row; a column without a value is empty. Return ``None`` where all columns are without a value."""
    parts = template_parts(template)
    if all(row[name] is None for _, name in parts if name is not None):
        return None
    values = ((text, "" if name is None or row[name] is None else str(row[name])) for text, name in parts)
    return "".join(text + value for text, value in values)


def _parts(template: str) -> Parts:
    found: list[tuple[str, str | None]] = []
    try:
        for text, name, spec, conversion in Formatter().parse(template):
            text = re.sub(r"\\[nt\\]", lambda escape: ESCAPES[escape[0]], text)
            if name is not None and (not name or spec or conversion or re.search(r"[.\[\]{}]", name)):
                shown: Any = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
                raise RefusedTemplate(f"{shown} is not the plain name of a column, such as {{title}}")
            found.append((text, name))
    except RefusedTemplate:
        raise
    except ValueError as error:
        raise RefusedTemplate(f"not a template ({error}); a brace itself is written twice, {{{{ or }}}}") from None
    if not any(name for _, name in found):
        raise RefusedTemplate("names no column; a template looks like {title}\\n\\n{body}")
    return tuple(found)
