"""Shapes: what the rows of a table are made of, as a snapshot says it, and how they fit a table of now.

A snapshot is loaded into whatever layout the cluster has by then. Series are told by what they are of (where, lifetime
or tile width, exact), columns by part, field and size: what the layout does not keep any more is passed over, and what
the snapshot has not is `lacking`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from millpond.feature_actors.aggregations import Column, where_text
from millpond.feature_actors.tiles.program import FOR_EVER

if TYPE_CHECKING:
    from millpond.feature_actors.layout import Layout, Table

__all__ = ["ColumnShape", "Fit", "SeriesShape", "TableShape", "fit_of", "lacking", "shape_of"]

Ints = npt.NDArray[np.int64]

_Words = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
_Ms = Annotated[int, msgspec.Meta(ge=-1, le=1 << 53)]


class ColumnShape(msgspec.Struct, frozen=True, omit_defaults=True):
    """A column of a partial: its part by name, what it looks at, its size; its words, and which of them are strings.

    field, by: the texts of its inputs; setting: see `Column`.
    """

    part: str
    field: str | None
    n: int
    words: _Words
    texts: tuple[_Words, ...]
    by: str | None = None
    setting: int = 0


class SeriesShape(msgspec.Struct, frozen=True):
    """A series, see `layout`; width_ms is the ttl of a lifetime series."""

    where: str
    lifetime: bool
    width_ms: _Ms
    exact: bool
    keep_ms: _Ms
    columns: tuple[ColumnShape, ...]

    @property
    def spot(self) -> tuple[str, bool, int, bool]:
        return self.where, self.lifetime, self.width_ms, self.exact

    @property
    def words(self) -> int:
        return sum(c.words for c in self.columns)


class TableShape(msgspec.Struct, frozen=True):
    """What the rows of a table are made of; added: as of `Table`."""

    source: str
    key: tuple[str, ...]
    wheres: tuple[str, ...]
    series: tuple[SeriesShape, ...]
    added: str = ""


def shape_of(table: Table) -> TableShape:
    """Return the shape of a table's rows: with it an image of them can be read by any other layout."""
    wheres = tuple(where_text(w) for w in table.wheres)
    series = tuple(
        SeriesShape(
            wheres[s.where], s.lifetime, s.width_ms, s.exact, s.keep_ms, tuple(_shape_of(c, table) for c in s.columns)
        )
        for s in table.series
    )
    return TableShape(table.source.name, table.key, wheres, series, table.added)


def _shape_of(column: Column, table: Table) -> ColumnShape:
    of, by = column.input, column.by
    is_text = of is not None and column.has_values and table.source.fields[of.field].type == "string"
    return ColumnShape(
        column.part.__name__,
        None if of is None else of.text,
        column.n,
        column.words,
        tuple(column.value_words) if is_text else (),
        None if by is None else by.text,
        column.setting,
    )


# -- how it fits a layout

# Columns of `Fit.series`: which series of the table it becomes, -1 for none; whether it is a lifetime, with a ttl,
# exact; words of its partial; from where its moves and strings stand, and how many there are.
FIT_SERIES, FIT_LIFETIME, FIT_TTL, FIT_EXACT, FIT_WORDS, FIT_MOVE, FIT_MOVES, FIT_TEXT, FIT_TEXTS = range(9)


class Fit(NamedTuple):
    """How the rows of an image become rows of a table.

    image_wheres: how many times a row of the image has; wheres int64 [wheres of the table]: which of them; series int64
    [series of the image, 9]; moves int64 [k, 3]: from where to where how many words of a partial go; texts int64 [k]:
    words of the partial that are addresses of strings then.
    """

    image_wheres: Any
    wheres: Ints
    series: Ints
    moves: Ints
    texts: Ints


def lacking(shape: TableShape, table: Table, layout: Layout) -> list[str]:
    """Return the features and views of a table that cannot be read from an image of that shape."""
    has = {series.spot: series for series in shape.series}
    wants = shape_of(table)

    def lacks(series: SeriesShape, keep_ms: int, columns: tuple[ColumnShape, ...]) -> bool:
        its = has.get(series.spot) if series.where in shape.wheres else None
        return its is None or (not series.lifetime and its.keep_ms < keep_ms) or not set(columns) <= set(its.columns)

    names = []
    for view in layout.kept_views.values():
        if layout.table_of(view) is not table:
            continue
        for feature in (f for f in view if f.derived is None):
            series, number, keep_ms = layout.kept_in(feature)
            columns = tuple(wants.series[number].columns[series.columns.index(c)] for c in feature.kept.columns)
            if lacks(wants.series[number], keep_ms, columns):
                names.append(f"`{feature.full_name}`")
        if where_text(view.where) not in shape.wheres:
            names.append(f"the condition of view `{view.name}`")
    # What is left is kept to tell whether an entity is known to a view.
    if not names and (
        any(lacks(series, series.keep_ms, series.columns) for series in wants.series)
        or not set(wants.wheres) <= set(shape.wheres)
    ):
        names.append(f"what tells whether a view of {table.name} knows an entity")
    return names


def fit_of(shape: TableShape, table: Table) -> Fit:
    """Return how rows of that shape become rows of the table; nothing of it is `lacking`."""
    wants = shape_of(table)
    numbers = {series.spot: number for number, series in enumerate(wants.series)}
    lines: list[list[int]] = []
    moves: list[list[int]] = []
    texts: list[int] = []
    for series in shape.series:
        number = numbers.get(series.spot, -1)
        first_move, first_text = len(moves), len(texts)
        if number >= 0:
            starts = dict(zip(series.columns, _starts(series), strict=True))
            for column, to in zip(wants.series[number].columns, _starts(wants.series[number]), strict=True):
                moves.append([starts[column], to, column.words])
                texts += [to + word for word in column.texts]
        ttl = series.lifetime and series.width_ms != FOR_EVER
        lines.append([
            number, series.lifetime, ttl, series.exact, series.words, first_move, len(moves) - first_move, first_text,
            len(texts) - first_text,
        ])  # fmt: skip
    return Fit(
        len(shape.wheres),
        np.array([shape.wheres.index(where) for where in wants.wheres], np.int64),
        np.array(lines, np.int64).reshape(-1, 9),
        np.array(moves, np.int64).reshape(-1, 3),
        np.array(texts, np.int64),
    )


def _starts(series: SeriesShape) -> Iterator[int]:
    at = 0
    for column in series.columns:
        yield at
        at += column.words
