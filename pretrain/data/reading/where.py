"""The rows that ``dataset.where`` keeps. pyarrow computes a condition over some hundred rows at a time, by the rules of SQL: a
comparison with a missing value is neither true nor false, and only rows for which the condition is true are kept."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from typing import Any, Protocol

from pretrain.data.reading.condition import ARITHMETIC, COMPARISONS, Condition, constant_of, parsed, path_of, source
from pretrain.data.reading.condition import Path as ColumnPath
from pretrain.data.reading.records import Document, shown_columns
from pretrain.data.reading.units import ReadOptions
from pretrain.runtime.errors import UserError, one_line

PHRASE = 5  # words of a phrase in ``repeated_phrases``


class Rows(Protocol):
    """Some neighbouring rows of a file."""

    loose: bool  # all values are text, whatever they mean (CSV)

    def __len__(self) -> int: ...

    def names(self) -> Sequence[str]:
        """Return the names of the columns."""

    def array(self, path: ColumnPath) -> Any:
        """Return the values of a column as a pyarrow array; ``None`` if no row has it."""

    def document(self, row: int) -> Document | None:
        """Return the document of a row; ``None`` if it has no text."""

    def place(self, row: int) -> str:
        """Return the description of a row for messages."""


def selected(rows: Iterable[Rows], options: ReadOptions, path: str) -> Iterator[Document | None]:
    """Yield the documents of the rows for which the condition is true, and ``None`` for each row that it removes.

    Raises:
        UserError: no row has one of the columns, or the condition can't be computed for their values.
    """
    assert options.where is not None
    condition, seen, names = parsed(options.where), set[ColumnPath](), dict[str, None]()
    for some in rows:
        arrays = {column: some.array(column) for column in condition.paths}
        seen.update(column for column, array in arrays.items() if array is not None)
        names.update(dict.fromkeys(some.names()))
        for row, kept in enumerate(_Evaluation(condition, some, arrays).mask()):
            if not kept:
                yield None
            elif (document := some.document(row)) is not None:
                yield document
    missing = [column for column in condition.paths if column not in seen]
    if missing and names:
        raise no_column(path, missing[0], names)


def no_column(path: str, column: ColumnPath, names: Iterable[str]) -> UserError:
    """Return the error for a column that the condition names and the file does not have."""
    return UserError(
        f"{path}: no column {'.'.join(column)!r} (dataset.where); the columns there: {shown_columns(names)}"
    )


@dataclass
class _Value:
    """A value of the condition.

    Attributes:
        data: a pyarrow array, or a scalar for a constant.
        kind: number | text | truth value | time | list | object | missing (only missing values, of no type).
        node: the part of the condition that it is.
        loose: it is a column of a CSV file, whose text may stand for a number or a truth value.
    """

    data: Any
    kind: str
    node: ast.expr
    loose: bool = False


class _Evaluation:
    """A condition that is computed over some rows."""

    def __init__(self, condition: Condition, rows: Rows, arrays: dict[ColumnPath, Any]) -> None:
        self.condition, self.rows, self.arrays = condition, rows, arrays

    def mask(self) -> list[bool]:
        """Return for each row whether the condition is true."""
        import pyarrow as pa

        try:
            found = self._truth(self.condition.tree)
        except pa.ArrowException as error:
            raise self._wrong(self.condition.tree, one_line(error)) from error
        return [value is True for value in found.to_pylist()]

    # Each method below returns the value of a node. Missing values stay missing (Kleene logic in and, or, not).

    def _truth(self, node: ast.expr) -> Any:
        """Return the values of a node that must be a truth value."""
        value = self._value(node)
        if value.loose and value.kind == "text":
            value = self._as_truth(value)
        if value.kind == "missing":
            return self._nothing()
        if value.kind != "truth value":
            raise self._wrong(node, f"{value.kind}, not a condition; compare it with something")
        return self._array(value)

    def _value(self, node: ast.expr) -> _Value:
        import pyarrow as pa
        import pyarrow.compute as pc

        is_constant, constant = constant_of(node)
        if is_constant:
            return _Value(pa.scalar(constant), _kind(pa.scalar(constant).type), node)
        if (path := path_of(node)) is not None:
            array = self.arrays[path]
            array = pa.nulls(len(self.rows)) if array is None else array
            return _Value(array, _kind(array.type), node, self.rows.loose)
        match node:
            case ast.BoolOp():
                combine = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
                return _Value(reduce(combine, map(self._truth, node.values)), "truth value", node)
            case ast.UnaryOp(op=ast.Not()):
                return _Value(pc.invert(self._truth(node.operand)), "truth value", node)
            case ast.UnaryOp():
                return _Value(pc.negate(self._number(self._value(node.operand))), "number", node)
            case ast.BinOp():
                left, right = (self._number(self._value(side)) for side in (node.left, node.right))
                return _Value(getattr(pc, ARITHMETIC[type(node.op)])(left, right), "number", node)
            case ast.Compare():
                return _Value(reduce(pc.and_kleene, self._comparisons(node)), "truth value", node)
            case ast.Call(func=ast.Name(id=name)):
                return self._call(node, name)
        raise AssertionError(ast.dump(node))

    def _comparisons(self, node: ast.Compare) -> Iterator[Any]:
        """Yield the truth values of ``a < b`` and ``b < c`` for ``a < b < c``."""
        import pyarrow.compute as pc

        value, left = cache(self._value), node.left  # an operand between two operators is computed once
        for operator, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, ast.Is | ast.IsNot):
                missing = pc.is_null(self._array(value(left)))
                yield missing if isinstance(operator, ast.Is) else pc.invert(missing)
            elif isinstance(operator, ast.In | ast.NotIn):
                found = self._contained(left, right, value, node)
                yield found if isinstance(operator, ast.In) else pc.invert(found)
            else:
                yield self._compare(COMPARISONS[type(operator)], value(left), value(right), node)
            left = right

    def _contained(self, left: ast.expr, right: ast.expr, value: Callable[[ast.expr], _Value], node: ast.expr) -> Any:
        """Return whether ``left`` is one of the constants ``right``, or a part of the text ``right``."""
        import pyarrow.compute as pc

        if isinstance(right, ast.Tuple | ast.List | ast.Set):
            return reduce(pc.or_kleene, (self._compare("equal", value(left), value(one), node) for one in right.elts))
        return pc.match_substring(self._text(value(right), node), constant_of(left)[1])

    def _compare(self, name: str, left: _Value, right: _Value, node: ast.expr) -> Any:
        """Return the truth values of a comparison of two values of one kind."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if "missing" in (left.kind, right.kind):
            return self._nothing()
        left, right = self._adapted(left, right.kind), self._adapted(right, left.kind)
        kinds = {left.kind, right.kind}
        if kinds == {"time", "text"}:
            moment, text = (left, right) if left.kind == "time" else (right, left)
            text.data, text.kind = pa.compute.cast(text.data, moment.data.type), "time"
        elif len(kinds) > 1:
            raise self._wrong(node, f"{left.kind} can't be compared with {right.kind}{_hint(kinds)}")
        elif kinds == {"number"}:
            left.data, right.data = _common(left.data, right.data)
        elif kinds & {"list", "object"}:
            raise self._wrong(node, f"{left.kind} can't be compared; a field of an object is written column.field")
        found = getattr(pc, name)(left.data, right.data)
        return self._array(_Value(found, "truth value", node))

    def _adapted(self, value: _Value, other: str) -> _Value:
        """Return the text of a CSV column as what it is compared with."""
        if value.loose and value.kind == "text" and other == "number":
            return _Value(self._number(value), "number", value.node)
        if value.loose and value.kind == "text" and other == "truth value":
            return self._as_truth(value)
        return _Value(value.data, value.kind, value.node)

    def _call(self, node: ast.Call, name: str) -> _Value:
        import pyarrow as pa
        import pyarrow.compute as pc

        value = self._value(node.args[0])
        if name == "number":
            return _Value(self._number(value, read=True), "number", node)
        if name == "len" and value.kind == "list":
            return _Value(pc.list_value_length(value.data), "number", node)
        text = self._text(value, node)
        if name in ("repeated_lines", "repeated_phrases"):
            share = {"repeated_lines": repeated_lines, "repeated_phrases": repeated_phrases}[name]
            shares = [None if one is None else share(one) for one in text.to_pylist()]
            return _Value(pa.array(shares, pa.float64()), "number", node)
        pattern = constant_of(node.args[-1])[1] if len(node.args) > 1 else None
        function, kind = {
            "len": (pc.utf8_length, "number"),
            "words": (partial(pc.count_substring_regex, pattern=r"[^\s]+"), "number"),
            "lines": (lambda data: pc.add(pc.count_substring(data, "\n"), 1), "number"),
            "lower": (pc.utf8_lower, "text"),
            "contains": (partial(pc.match_substring, pattern=pattern), "truth value"),
            "startswith": (partial(pc.starts_with, pattern=pattern), "truth value"),
            "endswith": (partial(pc.ends_with, pattern=pattern), "truth value"),
            "matches": (partial(pc.match_substring_regex, pattern=pattern), "truth value"),
            "count": (partial(pc.count_substring_regex, pattern=pattern), "number"),
        }[name]
        return _Value(function(text), kind, node)

    def _text(self, value: _Value, node: ast.expr) -> Any:
        """Return the array of a value that must be text."""
        import pyarrow as pa

        if value.kind not in ("text", "missing"):
            raise self._wrong(node, f"text is needed, not {value.kind}")
        return self._array(value).cast(pa.large_string())

    def _number(self, value: _Value, *, read: bool = False) -> Any:
        """Return a value as float64. The text of a CSV file is read as a number, other text only with ``read``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if value.kind == "text" and (read or value.loose):
            found = [self._read_number(text, value, row) for row, text in enumerate(self._array(value).to_pylist())]
            return pa.array(found, pa.float64())
        if value.kind not in ("number", "missing"):
            raise self._wrong(value.node, f"number is needed, not {value.kind}{_hint({value.kind, 'number'})}")
        return pc.cast(value.data, pa.float64(), safe=False)

    def _read_number(self, text: str | None, value: _Value, row: int) -> float | None:
        if text is None or not text.strip():
            return None
        try:
            if "_" not in text:
                return float(text)
        except ValueError:
            pass
        raise self._wrong(value.node, f"{text[:40]!r} is not a number", row)

    def _as_truth(self, value: _Value) -> _Value:
        """Return the text of a CSV column as truth values."""
        import pyarrow as pa

        words = {"true": True, "false": False, "": None, None: None}
        texts = [None if text is None else text.strip().lower() for text in value.data.to_pylist()]
        for row, text in enumerate(texts):
            if text is not None and text not in words:
                raise self._wrong(value.node, f"{text[:40]!r} is neither true nor false", row)
        return _Value(pa.array([words[text] for text in texts], pa.bool_()), "truth value", value.node)

    def _array(self, value: _Value) -> Any:
        """Return the data as an array with one value per row."""
        import pyarrow as pa

        return pa.repeat(value.data, len(self.rows)) if isinstance(value.data, pa.Scalar) else value.data

    def _nothing(self) -> Any:
        """Return missing truth values."""
        import pyarrow as pa

        return pa.nulls(len(self.rows), pa.bool_())

    def _wrong(self, node: ast.expr, reason: str, row: int = 0) -> UserError:
        return UserError(f"{self.rows.place(row)}: dataset.where: {source(node)}: {reason}")


def repeated_lines(text: str) -> float:
    """Return the share of lines that occurred before in the text; lines of white space do not count (Rae et al. 2021,
    arXiv:2112.11446, table A1)."""
    return _repeated([line.strip() for line in text.split("\n") if line.strip()])


def repeated_phrases(text: str) -> float:
    """Return the share of the sequences of ``PHRASE`` words that occurred before in the text."""
    words = text.split()
    return _repeated(list(zip(*(words[start:] for start in range(PHRASE)), strict=False)))


def _repeated(items: list[Any]) -> float:
    return 1 - len(set(items)) / len(items) if items else 0.0


def _kind(kind: Any) -> str:
    """Return the kind of a pyarrow type."""
    from pyarrow import types

    tests: dict[str, tuple[Callable[[Any], bool], ...]] = {
        "missing": (types.is_null,),
        "truth value": (types.is_boolean,),
        "number": (types.is_integer, types.is_floating, types.is_decimal),
        "text": (types.is_string, types.is_large_string, types.is_string_view),
        "time": (types.is_date, types.is_timestamp, types.is_time),
        "list": (types.is_list, types.is_large_list, types.is_fixed_size_list),
        "object": (types.is_struct,),
    }
    return next((name for name, ways in tests.items() if any(way(kind) for way in ways)), str(kind))


def _common(left: Any, right: Any) -> tuple[Any, Any]:
    """Return two numbers in a type that holds both: int64 for integers of at most 64 bits, otherwise float64."""
    import pyarrow as pa
    import pyarrow.compute as pc

    integers = all(pa.types.is_integer(side.type) and side.type != pa.uint64() for side in (left, right))
    kind = pa.int64() if integers else pa.float64()
    return pc.cast(left, kind, safe=False), pc.cast(right, kind, safe=False)


def _hint(kinds: set[str]) -> str:
    return "; number(…) reads a text as a number" if kinds == {"text", "number"} else ""
