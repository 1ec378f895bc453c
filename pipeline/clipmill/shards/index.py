"""The columns of an index, each read when it is first asked for: there are far more than training needs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipmill import tables

_CODED = pa.dictionary(pa.int32(), pa.string())


class Index:
    """One index: a Parquet file of which columns are read one by one, or a table in memory.

    Args:
        source: either.
        schema: of the file.

    Attributes:
        column_names: those of the schema or table.
        num_rows: clips.

    Raises:
        TableError: the file is missing, no Parquet, or lacks columns; a damaged column when it is read.
    """

    def __init__(self, source: Path | pa.Table, schema: pa.Schema = tables.INDEX) -> None:
        self._source, self._schema = source, schema
        self._lock = threading.Lock()
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._labels: tuple[NDArray[np.int32], NDArray[np.int64], list[str]] | None = None
        if isinstance(source, pa.Table):
            self.column_names, self.num_rows = source.column_names, source.num_rows
        else:
            self.column_names, self.num_rows = schema.names, tables.check_columns(source, schema)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self._source, "schema": self._schema}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """A column, `[clips]`, which is kept."""
        with self._lock:
            if name not in self._columns:
                self._columns[name] = self.read(name)
            return self._columns[name]

    def read(self, name: str) -> pa.ChunkedArray:
        """A column, `[clips]`, for who makes something else of it."""
        if isinstance(self._source, pa.Table):
            return self._source[name]
        return tables.read_table(self._source, pa.schema([self._schema.field(name)]))[name]

    def coded(self, name: str) -> tuple[NDArray[np.int32], list[str]]:
        """A column of texts as a code for each clip, `[clips]`, and what the codes stand for."""
        if isinstance(self._source, pa.Table):
            column = self._source[name].dictionary_encode()
        else:
            column = tables.read_table(self._source, pa.schema([pa.field(name, _CODED)]))[name]
        whole = column.unify_dictionaries().combine_chunks()
        return whole.indices.to_numpy(), whole.dictionary.to_pylist()

    def label_lists(self) -> tuple[NDArray[np.int32], NDArray[np.int64], list[str]]:
        """Labels as codes `[entries]`, where each clip's begin `[clips + 1]`, and what the codes stand for.

        As texts, the labels of 2 M clips would be a hundred times as much.
        """
        with self._lock:
            if self._labels is None:
                if isinstance(self._source, pa.Table):
                    self._labels = _coded_lists([self._source])
                else:
                    schema = pa.schema([self._schema.field("labels")])
                    self._labels = _coded_lists(tables.read_batches(self._source, schema))
            return self._labels

    def table(self) -> pa.Table:
        """All columns; they are not kept."""
        if isinstance(self._source, pa.Table):
            return self._source
        return tables.read_table(self._source, self._schema)


class Columns:
    """The columns of one or several indexes, end to end, at chosen rows.

    Attributes:
        rows: int64 `[clips]`, which rows of all the indexes together; None: all of them.
    """

    def __init__(self, indexes: Sequence[Index], rows: NDArray[np.int64] | None = None) -> None:
        self.indexes, self.rows = tuple(indexes), rows
        self._taken: dict[str, pa.ChunkedArray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"indexes": self.indexes, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def column_names(self) -> list[str]:
        """Names of the columns that all of the indexes have."""
        first, *others = (index.column_names for index in self.indexes)
        return [name for name in first if all(name in names for names in others)]

    @property
    def num_rows(self) -> int:
        """Clips."""
        return sum(index.num_rows for index in self.indexes) if self.rows is None else len(self.rows)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """A column at the chosen rows, `[clips]`."""
        with self._lock:
            if name not in self._taken:
                whole = _joined([index.read(name) for index in self.indexes])
                self._taken[name] = whole if self.rows is None else _take(whole, self.rows)
            return self._taken[name]

    def at(self, name: str, rows: NDArray[np.integer]) -> list[Any]:
        """A column's values at a few of the rows, without taking all of the chosen ones."""
        places = np.asarray(rows, np.int64) if self.rows is None else self.rows[rows]
        return _joined([index[name] for index in self.indexes]).take(pa.array(places)).to_pylist()

    def table(self) -> pa.Table:
        """All columns at the chosen rows."""
        names = self.column_names
        whole = pa.concat_tables([index.table().select(names) for index in self.indexes])
        return whole if self.rows is None else whole.combine_chunks().take(pa.array(self.rows, pa.int64()))

    def take(self, rows: NDArray[np.integer]) -> Columns:
        """The columns at these of the rows, in this order."""
        taken = np.asarray(rows, np.int64) if self.rows is None else self.rows[rows]
        return Columns(self.indexes, taken)


def _coded_lists(parts: Iterable[pa.Table]) -> tuple[NDArray[np.int32], NDArray[np.int64], list[str]]:
    """What `Index.label_lists` gives, of tables end to end."""
    places: dict[str, int] = {}
    codes, counts = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    for part in parts:
        for lists in part["labels"].chunks:
            found = lists.flatten().dictionary_encode()
            own = [places.setdefault(name, len(places)) for name in found.dictionary.to_pylist()]
            codes.append(np.array(own, np.int32)[found.indices.to_numpy()])
            counts.append(pc.list_value_length(lists).to_numpy().astype(np.int64))
    return np.concatenate(codes), np.cumsum(np.concatenate(counts)), list(places)


def _joined(columns: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)


def _take(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> pa.ChunkedArray:
    whole = column.combine_chunks()  # taking from many chunks is slow
    taken = whole.take(pa.array(rows, pa.int64()))
    return taken if isinstance(taken, pa.ChunkedArray) else pa.chunked_array([taken])
