"""`--where`: choose rows of the index by an expression over its columns.

    silent < 0.9 and duration_s >= 1
    "dog" in labels and not (clipped > 0 or fold in [1, 2])
    loudness_lufs is not None and -30 <= loudness_lufs < -10

It is read as Python writes it, and never run: the syntax tree becomes calls of pyarrow.compute.
What is not known (null, or a division by zero) is so in SQL's way: a comparison with it is
neither true nor false, nor is its `not`, and a row is kept only where the whole is true.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill.errors import ConfigError

_COMPARISONS: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_SUMS: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: lambda left, right: pc.divide(left, pc.if_else(pc.equal(right, 0.0), None, right)),
}

_NUMBER, _TEXT, _TRUTH, _TEXTS = "a number", "text", "a condition", "a list of texts"
_LIST, _NONE = "a list", "None"


def matching(index: pa.Table, text: str) -> pa.BooleanArray:
    """`[rows]`: whether each row of the index fulfils the expression; never null.

    Raises:
        ConfigError: the expression is malformed, names no column, or compares what cannot be compared.
    """
    return _Expression(index, text).rows()


@dataclass(frozen=True)
class _Value:
    """What a part of the expression comes to: an Arrow array, or a scalar where it is constant."""

    kind: str
    data: Any
    node: ast.expr

    @property
    def constant(self) -> bool:
        return isinstance(self.data, pa.Scalar)


class _Expression:
    """One expression over one table; each method turns a kind of syntax into an Arrow value."""

    def __init__(self, index: pa.Table, text: str) -> None:
        self._index, self._text = index, text.replace("\n", " ").strip()

    def rows(self) -> pa.BooleanArray:
        if not self._text:
            raise self._error("is empty")
        try:
            tree = ast.parse(self._text, mode="eval").body
            data = self._condition(tree)
        except SyntaxError as error:
            place = f" at character {error.offset}" if error.offset else ""
            raise self._error(f"cannot be read{place} ({error.msg})") from error
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise self._error(f"cannot be read ({str(error) or 'too deeply nested'})") from error
        if isinstance(data, pa.Scalar):
            data = pa.repeat(data, self._index.num_rows)
        return pc.fill_null(data, False)

    def _condition(self, node: ast.expr) -> Any:
        value = self._value(node)
        if value.kind != _TRUTH:
            raise self._error(f"is {value.kind}, where a condition such as `silent < 0.9` is needed", node)
        return value.data

    def _value(self, node: ast.expr) -> _Value:
        match node:
            case ast.Name(id=name):
                return self._column(node, name)
            case ast.Constant(value=bool(constant)):
                return _Value(_TRUTH, pa.scalar(constant), node)
            case ast.Constant(value=int(constant) | float(constant)):
                return _Value(_NUMBER, pa.scalar(float(constant), pa.float64()), node)
            case ast.Constant(value=str(constant)):
                return _Value(_TEXT, pa.scalar(constant, pa.string()), node)
            case ast.Constant(value=None):
                return _Value(_NONE, None, node)
            case ast.List() | ast.Tuple():
                return _Value(_LIST, None, node)
            case ast.BoolOp(op=op, values=nodes):
                join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                first, *others = (self._condition(part) for part in nodes)
                for other in others:
                    first = join(first, other)
                return _Value(_TRUTH, first, node)
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return _Value(_TRUTH, pc.invert(self._condition(part)), node)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=part):
                number = self._number(part)
                return _Value(_NUMBER, pc.negate(number) if isinstance(op, ast.USub) else number, node)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SUMS:
                return _Value(_NUMBER, _SUMS[type(op)](self._number(left), self._number(right)), node)
            case ast.Compare(left=left, ops=ops, comparators=nodes):
                values = [self._value(part) for part in (left, *nodes)]
                data: Any = pa.scalar(True)
                for before, comparison, after in zip(values, ops, values[1:], strict=False):
                    data = pc.and_kleene(data, self._compared(before, comparison, after))
                return _Value(_TRUTH, data, node)
        raise self._error(
            "is not understood; allowed are columns, numbers, quoted text, comparisons, in, is None, "
            "and, or, not, + - * / and parentheses",
            node,
        )

    def _column(self, node: ast.expr, name: str) -> _Value:
        if name not in self._index.column_names:
            close = get_close_matches(name, self._index.column_names, 1)
            raise self._error("is no column" + (f" (did you mean {close[0]}?)" if close else ""), node)
        data = self._index[name].combine_chunks()
        if pa.types.is_list(data.type) and pa.types.is_string(data.type.value_type):
            kind = _TEXTS
        elif pa.types.is_integer(data.type) or pa.types.is_floating(data.type):
            kind = _NUMBER
        else:
            kind = _TEXT if pa.types.is_string(data.type) else f"a column of {data.type}"
        return _Value(kind, data, node)

    def _number(self, node: ast.expr) -> Any:
        """As float64, in which no sum overflows."""
        value = self._value(node)
        if value.kind != _NUMBER:
            raise self._error(f"is {value.kind}, where a number is needed", node)
        return value.data.cast(pa.float64())

    def _compared(self, left: _Value, op: ast.cmpop, right: _Value) -> Any:
        match op:
            case ast.Is() | ast.IsNot():
                if right.kind != _NONE or left.data is None:
                    raise self._error("is compared by `is`, which is for columns and None alone", right.node)
                return pc.is_null(left.data) if isinstance(op, ast.Is) else pc.is_valid(left.data)
            case ast.In():
                return self._contained(left, right)
            case ast.NotIn():
                return pc.invert(self._contained(left, right))
        for value in (left, right):
            if value.kind == _NONE:
                raise self._error("is compared by `is None` and `is not None` only", value.node)
        if left.kind != right.kind or left.kind not in (_NUMBER, _TEXT):
            raise self._error(f"is {right.kind} and cannot be compared with {left.kind}", right.node)
        return _COMPARISONS[type(op)](_as_stored(left, right), _as_stored(right, left))

    def _contained(self, left: _Value, right: _Value) -> Any:
        if right.kind == _TEXTS and left.kind == _TEXT and left.constant:
            return _any_is(right.data, left.data)
        if right.kind == _TEXT and left.kind == _TEXT and left.constant:
            return pc.match_substring(right.data, left.data.as_py())
        if right.kind != _LIST or left.kind not in (_NUMBER, _TEXT):
            raise self._error(
                'cannot be looked in; `in` takes a list such as [1, 2], or a quoted text before it: "dog" in labels',
                right.node,
            )
        assert isinstance(right.node, ast.List | ast.Tuple)
        members = [self._value(part) for part in right.node.elts]
        for member in members:
            if member.kind != left.kind or not member.constant:
                raise self._error(f"is no constant, or not {left.kind} as what is looked for is", member.node)
        wanted = pa.array([_as_stored(m, left).as_py() for m in members], _type_of(left))
        looked_for = left.data.cast(wanted.type)
        if left.kind == _NUMBER:  # is_in tells -0.0 from 0.0
            looked_for, wanted = (
                pc.add(values, pa.scalar(0.0, wanted.type)) for values in (looked_for, wanted)
            )
        found = pc.is_in(looked_for, wanted)
        return pc.if_else(pc.is_null(left.data), None, found)

    def _error(self, what: str, node: ast.expr | None = None) -> ConfigError:
        part = ""
        if node is not None:
            fragment = ast.get_source_segment(self._text, node) or ""
            before = len(self._text.encode()[: node.col_offset].decode())
            part = f"`{fragment}` at character {before + 1} "
        return ConfigError(
            f"--where {self._text!r}: {part}{what}. Columns are {', '.join(self._index.column_names)}"
        )


def _as_stored(value: _Value, beside: _Value) -> Any:
    """A constant as precise as the column that it stands beside: 0.9 in single precision is less than 0.9."""
    single = not beside.constant and beside.data.type == pa.float32()
    return value.data.cast(pa.float32(), safe=False) if value.constant and single else value.data


def _type_of(value: _Value) -> pa.DataType:
    return pa.float64() if pa.types.is_integer(value.data.type) else value.data.type


def _any_is(lists: pa.ListArray, text: pa.Scalar) -> pa.BooleanArray:
    """`[rows]`: whether any text of each row's list is `text`; null where the list is."""
    same = pc.fill_null(pc.equal(pc.list_flatten(lists), text), False)
    found = np.zeros(len(lists), bool)
    found[pc.list_parent_indices(lists).filter(same).to_numpy()] = True
    return pc.if_else(pc.is_null(lists), None, found)
