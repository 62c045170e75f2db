"""The conditions of ``dataset.where``, such as ``lang == 'es' and score > 0.8``: what they may contain.

A condition has the syntax of a Python expression. It is parsed into a tree and never run as Python: only the nodes, names and
functions of this module are accepted, and pyarrow computes them (`pretrain.data.reading.where`). None of its functions reads a
file, has a side effect, or takes more than linear time (regular expressions are those of RE2).
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from pretrain.runtime.errors import UserError, did_you_mean, one_line

LONGEST = 4_000  # characters of a condition
DEEPEST = 100  # nesting of a condition, and of the fields of a column
SURROGATE = re.compile("[\ud800-\udfff]")
EXAMPLE = "lang == 'es' and score > 0.8"
CONSTANTS = {"true": True, "false": False, "null": None}
COMPARISONS = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
ARITHMETIC = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
# name → number of arguments; the second argument is a text constant
FUNCTIONS = {
    "len": 1,
    "words": 1,
    "lines": 1,
    "lower": 1,
    "number": 1,
    "repeated_lines": 1,
    "repeated_phrases": 1,
    "contains": 2,
    "startswith": 2,
    "endswith": 2,
    "matches": 2,
    "count": 2,
}
Path = tuple[str, ...]  # ("meta", "lang") is field lang of column meta


@dataclass(frozen=True)
class Condition:
    """A checked condition.

    Attributes:
        text: the condition as it was given.
        tree: its tree, which contains only what this module accepts.
        paths: the columns that it names.
    """

    text: str
    tree: ast.expr
    paths: tuple[Path, ...]


@lru_cache(maxsize=64)
def parsed(text: str) -> Condition:
    """Return the condition that ``text`` stands for. Raises ``UserError`` for anything that a condition can't contain."""
    try:
        tree = _checked_tree(text)
    except Refused as error:
        raise UserError(f"dataset.where={text[:200]!r}: {error}") from None
    return Condition(text, tree, tuple(dict.fromkeys(_paths(tree))))


class Refused(ValueError):
    """Something that a condition can't contain."""


def check_syntax(text: str) -> str:
    """Return ``text``. Raises ``Refused`` if it is not a condition."""
    _checked_tree(text)
    return text


def path_of(node: ast.expr) -> Path | None:
    """Return the column that a node names; ``None`` if it is not a column."""
    fields: list[str] = []
    while isinstance(node, ast.Attribute):
        fields.append(node.attr)
        node = node.value
    match node:
        case ast.Name(id=name) if name not in CONSTANTS:
            return (name, *reversed(fields))
        case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str() as name)], keywords=[]):
            return (name, *reversed(fields))
    return None


def constant_of(node: ast.expr) -> tuple[bool, object]:
    """Return (whether the node is a constant, its value). A minus sign belongs to the constant."""
    if isinstance(node, ast.Constant):
        return True, node.value
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return True, CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        if isinstance(value, int | float) and _is_number(value):
            return True, -value
    return False, None


def _checked_tree(text: str) -> ast.expr:
    """Return the tree of a condition. Raises ``Refused`` if it is not one."""
    if len(text) > LONGEST:
        raise Refused(f"longer than {LONGEST:,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an escape such as \d in a regular expression
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else one_line(error)
        raise Refused(f"not a condition ({reason}); one looks like {EXAMPLE}") from None
    except (RecursionError, MemoryError):
        raise Refused("nested too deep") from None
    _check(tree, 0)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and SURROGATE.search(node.value):
            raise Refused(f"{_source(node)}: half of a surrogate pair, which is not a character")
    if not any(True for _ in _paths(tree)):
        raise Refused(f"names no column; a condition looks like {EXAMPLE}")
    return tree


def _check(node: ast.expr, depth: int) -> None:
    """Raise ``Refused`` unless the node and all nodes below it may be in a condition."""
    if depth > DEEPEST:
        raise Refused("nested too deep")
    for child in _children(node):
        _check(child, depth + 1)


def _children(node: ast.expr) -> list[ast.expr]:
    """Return the operands of a node. Raises ``Refused`` if it can't be in a condition."""
    match node:
        case ast.BoolOp():
            return node.values
        case ast.UnaryOp(op=ast.Not()):
            return [node.operand]
        case ast.UnaryOp(op=ast.USub()):
            if isinstance(node.operand, ast.Constant) and not _is_number(node.operand.value):
                raise Refused(f"{_source(node)}: only a number can be negative")
            return [node.operand]
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            return [node.left, node.right]
        case ast.Compare():
            return _compared(node)
        case ast.Call():
            return _arguments(node)
        case ast.Name():
            return []
        case ast.Attribute():
            path = path_of(node)
            if path is None:
                raise Refused(f"{_source(node)}: only a column has fields")
            if len(path) > DEEPEST:
                raise Refused("nested too deep")
            return []
        case ast.Constant():
            if node.value is not None and not isinstance(node.value, str | bool) and not _is_number(node.value):
                raise Refused(f"{_source(node)}: not a text, a number, true, false or None")
            return []
    raise Refused(f"{_source(node)} can't be in a condition, which looks like {EXAMPLE}")


def _compared(node: ast.Compare) -> list[ast.expr]:
    """Return the operands of a comparison."""
    found = [node.left]
    for operator, value in zip(node.ops, node.comparators, strict=True):
        if isinstance(operator, ast.In | ast.NotIn) and isinstance(value, ast.Tuple | ast.List | ast.Set):
            if not value.elts or not all(constant_of(element)[0] for element in value.elts):
                raise Refused(f"{_source(value)}: a list of constants is needed, such as ('es', 'pt')")
            if value is not node.comparators[-1]:
                raise Refused(
                    f"{_source(node)}: a comparison ends with its list; parentheses around it let it be compared"
                )
            found += value.elts
        elif isinstance(operator, ast.In | ast.NotIn) and not isinstance(constant_of(found[-1])[1], str):
            raise Refused(f"{_source(node)}: in is followed by constants in parentheses, such as ('es', 'pt')")
        elif isinstance(operator, ast.Is | ast.IsNot) and constant_of(value) != (True, None):
            raise Refused(f"{_source(node)}: is and is not are followed by None; compare with == and !=")
        elif not isinstance(operator, ast.Is | ast.IsNot) and (True, None) in (
            constant_of(value),
            constant_of(found[-1]),
        ):
            raise Refused(f"{_source(node)} is never true; whether a value is missing is written is None")
        else:
            found.append(value)
    return found


def _arguments(node: ast.Call) -> list[ast.expr]:
    """Return the arguments of a function that are conditions or values themselves."""
    name = node.func.id if isinstance(node.func, ast.Name) else _source(node.func)
    if name != "column" and name not in FUNCTIONS:
        raise Refused(f"no function {name!r}{did_you_mean(name, [*FUNCTIONS, 'column'])}")
    wanted = FUNCTIONS.get(name, 1)
    is_text = [isinstance(argument, ast.Constant) and isinstance(argument.value, str) for argument in node.args]
    if node.keywords or len(node.args) != wanted or any(isinstance(argument, ast.Starred) for argument in node.args):
        raise Refused(f"{_source(node)}: {name} has {wanted} argument{'s' if wanted > 1 else ''}")
    if (name == "column" or wanted == 2) and not is_text[-1]:
        raise Refused(f"{_source(node)}: the last argument of {name} is a text in quotes")
    return [] if name == "column" else node.args[:1]


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _paths(tree: ast.expr) -> Iterator[Path]:
    """Yield the columns that a checked tree names, the longest path of each (``meta.lang`` and not ``meta``)."""
    if (path := path_of(tree)) is not None:
        yield path
        return
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.expr) and not (isinstance(tree, ast.Call) and child is tree.func):
            yield from _paths(child)


def source(node: ast.expr) -> str:
    """Return the text of a node for messages."""
    text = ast.unparse(node)
    return text if len(text) <= 80 else text[:77] + "..."


def _source(node: ast.expr) -> str:
    try:
        return source(node)
    except (RecursionError, ValueError):
        return "a part of it"
