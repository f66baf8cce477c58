"""A feature view: a source, an entity key and named features over its events, owned by a team."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.aggregations import NUMBERS, Aggregation, Derived, Input, where_text
from millpond.feature_actors.errors import DeclarationError, did_you_mean
from millpond.feature_actors.source import Source, check_name, check_owner

__all__ = ["KEY_TYPES", "Feature", "FeatureView"]

#: Types that a key field may have: integers widen to int64; strings are compared byte by byte.
KEY_TYPES = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "string"})
#: An event is hardly further ahead of its arrival: clusters refuse more than `ahead_max`, 10 minutes unless set.
AHEAD_MS = 86_400_000
#: What every aggregation has.
_OF_ALL = frozenset(f.name for f in fields(Aggregation))


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature of a view; what `view["name"]` returns."""

    view: FeatureView
    name: str
    aggregation: Aggregation | Derived

    @property
    def derived(self) -> Derived | None:
        """What it is computed by, if from other features."""
        return self.aggregation if isinstance(self.aggregation, Derived) else None

    @property
    def kept(self) -> Aggregation:
        """What is kept for it; not of a derived feature."""
        assert isinstance(self.aggregation, Aggregation)
        return self.aggregation

    @property
    def of(self) -> tuple[Feature, ...]:
        """The features that a derived one is computed from."""
        return () if self.derived is None else tuple(self.view[name] for name in self.derived.of)

    @property
    def width(self) -> int:
        """Columns of a feature matrix that it takes."""
        return 1 if self.derived is not None else self.kept.width

    @property
    def is_text(self) -> bool:
        """Whether its values are strings, which stand beside the matrix."""
        if self.derived is not None or self.kept.field is None or self.kept.gives_numbers:
            return False
        return bool(self.view.source.fields[self.kept.field].type == "string")

    @property
    def full_name(self) -> str:
        return f"{self.view.name}.{self.name}"

    @property
    def wire_name(self) -> str:
        """Name and identity: what a shard is asked for, and refuses if it knows it otherwise."""
        return f"{self.full_name}#{self.id}"

    @property
    def made_by(self) -> str:
        """What computes it, as it is declared, such as `Sum("price")`; without when and where it looks."""
        made, arguments = self.aggregation, list[str]()
        if isinstance(made, Derived):
            if type(made) is Derived:
                arguments.append(getattr(made.function, "__name__", type(made.function).__name__))
            arguments += [f'"{name}"' for name in made.of]
        else:
            arguments += [] if made.field is None else [f'"{made.field}"']
            own = [f.name for f in fields(made) if f.init and f.name not in _OF_ALL]
            arguments += [f"{name}={_shown(getattr(made, name))}" for name in own]
        return f"{type(made).__name__}({', '.join(arguments)})"

    @property
    def definition(self) -> str:
        """All of its declaration in one line, such as `Sum("price", window="30d", where=(price > 50))`."""
        if self.derived is not None:
            return self.made_by
        kept, arguments = self.kept, [self.made_by.partition("(")[2].removesuffix(")")]
        arguments += [f'{name}="{value}"' for name in ("window", "ttl") if (value := getattr(kept, name)) is not None]
        arguments += ["exact=True"] * kept.exact
        arguments += [] if kept.where is None else [f"where={' '.join(str(kept.where).split())}"]
        return f"{type(kept).__name__}({', '.join(filter(None, arguments))})"

    @property
    def reach_ms(self) -> int | None:
        """How long before an as-of an event may have arrived that it sees, its tile and what events are ahead of their
        arrival included; None if for ever. Not of a derived feature."""
        kept = self.kept
        return None if kept.window_ms is None else kept.window_ms + (kept.tile_width_ms or 0) + AHEAD_MS

    @property
    def reads(self) -> set[str]:
        """The fields that it looks at, in its condition, too. Not of a derived feature."""
        return fields_of(self.view.source, self.kept.inputs) | fields_in(self.view.source, [self.where])

    @property
    def where(self) -> pc.Expression | None:
        """The view's and the feature's `where` together, or None."""
        both = [w for w in (self.view.where, self.kept.where) if w is not None]
        return both[0] & both[1] if len(both) == 2 else (both[0] if both else None)

    @property
    def id(self) -> str:
        """The feature's identity: a digest of what it computes, whatever it is called.

        Two features of one definition share their state; a changed definition is another feature.
        """
        return self._id({})

    def _id(self, known: dict[str, str]) -> str:
        """Return the identity; known: of features of the view by name, so that none is computed twice."""
        if self.name not in known:
            known[self.name] = hashlib.sha256(json.dumps(self._content(known), sort_keys=True).encode()).hexdigest()[
                :16
            ]
        return known[self.name]

    def _content(self, known: dict[str, str]) -> dict[str, Any]:
        if self.derived is not None:
            return {**self.derived.identity(), "of": [f._id(known) for f in self.of]}
        return {
            **self.kept.identity(),
            "source": [self.view.source.name, self.view.source.version],
            "key": self.view.key,
            "where": where_text(self.where),
        }


@dataclass(frozen=True, eq=False)
class FeatureView:
    """Declare features of one entity over the events of one source.

    key: the field or fields that the view is about; several make a composite key.
    features: name to aggregation.
    where: a `pyarrow.compute` expression that every event of the view satisfies.

    Raises `DeclarationError` that names the view and the feature if anything does not fit.
    """

    name: str
    owner: str = ""
    source: Source = None  # type: ignore[assignment]
    key: list[str] = field(default_factory=list)
    features: Mapping[str, Aggregation | Derived] = field(default_factory=dict)
    where: pc.Expression | None = None
    about: str = ""

    def __post_init__(self) -> None:
        check_name("view", self.name)
        check_owner("view", self.name, self.owner)
        if not isinstance(self.source, Source):
            raise DeclarationError(f"view `{self.name}`: source must be a Source, got {self.source!r}")
        self._check_key()
        if not isinstance(self.features, Mapping):
            raise DeclarationError(
                f"view `{self.name}`: features is a mapping of name to aggregation such as "
                f'{{"orders": Count()}}, got {self.features!r}'
            )
        if not self.features:
            raise DeclarationError(f"view `{self.name}`: no features")
        self._check_where(f"view `{self.name}`", self.where)
        for name, aggregation in self.features.items():
            self._check_feature(name, aggregation)

    def _check_key(self) -> None:
        if not isinstance(self.key, list | tuple) or not self.key:
            raise DeclarationError(f"view `{self.name}`: key must be a list of fields, got {self.key!r}")
        for name in self.key:
            if not isinstance(name, str) or name not in self.source.fields:
                raise DeclarationError(
                    f"view `{self.name}`: key field {name!r} is not a field of source `{self.source.name}`"
                    + did_you_mean(str(name), self.source.fields)
                )
            if name == "as_of":
                raise DeclarationError(
                    f"view `{self.name}`: key field `as_of` has the name of the time that features are asked for; "
                    "give the field another name"
                )
            spec = self.source.fields[name]
            if spec.type not in KEY_TYPES:
                raise DeclarationError(
                    f"view `{self.name}`: key field `{name}` is `{spec.type}`; a key is of integers (up to "
                    "int64) and strings"
                )
        if len(set(self.key)) != len(self.key):
            raise DeclarationError(f"view `{self.name}`: a key field is named twice in {self.key!r}")

    def _check_feature(self, name: str, aggregation: Aggregation | Derived) -> None:
        subject = f"view `{self.name}`: feature"
        check_name(subject, name)
        subject = f"{subject} `{name}`"
        if name in self.key:
            raise DeclarationError(f"{subject} has the name of a key field")
        if isinstance(aggregation, Derived):
            self._check_derived(subject, name, aggregation)
            return
        if not isinstance(aggregation, Aggregation):
            raise DeclarationError(f"{subject} must be an aggregation such as Count(), got {aggregation!r}")
        kind = type(aggregation).__name__
        for one in aggregation.inputs:
            if one.condition is not None:
                self._check_where(subject, one.condition, "of=")
                continue
            if one.field not in self.source.fields:
                raise DeclarationError(
                    f"{subject}: {kind} of {one.field!r}, which is not a field of source `{self.source.name}`"
                    + did_you_mean(one.field, self.source.fields)
                )
            spec = self.source.fields[one.field]
            if one.kind == "category":
                self._check_categories(f"{subject}: {kind}", one, spec.type)
            elif spec.type not in NUMBERS and not (aggregation.takes == "value" and spec.type == "string"):
                takes = "a number" if aggregation.takes == "number" else "a number or a string"
                raise DeclarationError(f"{subject}: {kind} takes {takes}, `{one.field}` is `{spec.type}`")
        self._check_where(subject, aggregation.where)

    def _check_categories(self, subject: str, of: Input, field_type: str) -> None:
        if field_type not in KEY_TYPES:
            raise DeclarationError(
                f"{subject} takes a field of integers (up to int64) or strings, `{of.field}` is `{field_type}`"
            )
        wanted = str if field_type == "string" else int
        for category in of.categories:
            if type(category) is not wanted or (wanted is int and not -(2**63) <= category < 2**63):  # type: ignore[operator]
                raise DeclarationError(
                    f"{subject}: category {category!r} is no value of field `{of.field}`, which is `{field_type}`"
                )

    def _check_derived(self, subject: str, name: str, derived: Derived) -> None:
        before = list(self.features)[: list(self.features).index(name)]
        for one in derived.of:
            if one not in before:
                raise DeclarationError(
                    f"{subject}: {type(derived).__name__} of {one!r}, which is not a feature that stands before it"
                    + did_you_mean(one, before)
                )
            if self[one].is_text:
                raise DeclarationError(f"{subject}: {type(derived).__name__} takes numbers, `{one}` is of strings")

    def _check_where(self, subject: str, where: pc.Expression | None, what: str = "where=") -> None:
        """Try the expression on an empty batch: unknown fields and wrong types show at once."""
        if where is None:
            return
        if not isinstance(where, pc.Expression):
            raise DeclarationError(f"{subject}: {what} takes a pyarrow.compute expression, got {where!r}")
        try:
            mask_of(where, pa.RecordBatch.from_pylist([], schema=self.source.schema))
            where_text(where)  # which a field without a name has not
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DeclarationError(
                f"{subject}: {what} `{where}` does not fit source `{self.source.name}`: {str(error).splitlines()[0]}"
            ) from None

    def __getitem__(self, name: str) -> Feature:
        if name not in self.features:
            raise DeclarationError(f"view `{self.name}`: no feature {name!r}" + did_you_mean(str(name), self.features))
        return Feature(self, name, self.features[name])

    def __iter__(self) -> Any:
        return (self[name] for name in self.features)

    @property
    def reads(self) -> set[str]:
        """The fields that its features look at, in its conditions, too."""
        return set().union(*(feature.reads for feature in self if feature.derived is None))


def _shown(setting: Any) -> str:
    """Return a setting as it is declared."""
    if isinstance(setting, pc.Expression):
        return " ".join(str(setting).split())
    if isinstance(setting, str | tuple):
        return json.dumps(setting, ensure_ascii=False)
    return repr(setting)


def fields_in(source: Source, wheres: Iterable[pc.Expression | None]) -> set[str]:
    """Return the fields of a source that conditions name, or more: what has such a name in their text."""
    texts = " ".join(where_text(where) for where in wheres)
    return {name for name in source.fields if re.search(rf"\b{name}\b", texts)}


def fields_of(source: Source, inputs: Iterable[Input]) -> set[str]:
    """Return the fields of a source that inputs look at."""
    inputs = list(inputs)
    conditions = fields_in(source, [one.condition for one in inputs])
    return {one.field for one in inputs if one.kind != "truth"} | conditions


def mask_of(where: pc.Expression, batch: pa.RecordBatch) -> pa.Array:
    """Return which rows satisfy `where`, a boolean Arrow array without nulls.

    Raises `TypeError` if the expression is not boolean.
    """
    from pyarrow import acero

    # Acero evaluates an expression over a batch; there is no lighter public way (0.1 ms a call).
    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(pa.Table.from_batches([batch]))),
            acero.Declaration("project", acero.ProjectNodeOptions([where], ["mask"])),
        ]
    )
    mask = plan.to_table(use_threads=False).column(0).combine_chunks()
    if isinstance(mask, pa.ChunkedArray):
        mask = pa.concat_arrays(mask.chunks) if mask.num_chunks else pa.array([], mask.type)
    if not pa.types.is_boolean(mask.type):
        raise TypeError(f"the expression gives {mask.type}, not bool")
    return mask.fill_null(False)


def holds(where: pc.Expression, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Return which events satisfy `where`, bool [n]; those for which it cannot be computed do not.

    Who sends such an event is refused, but there may be some from before the condition was declared. Raises as
    `mask_of`, and `ArrowException` for one that does not fit the batch's fields.
    """
    try:
        mask: npt.NDArray[np.bool_] = mask_of(where, batch).to_numpy(zero_copy_only=False)
        return mask
    except pa.ArrowException:
        if batch.num_rows <= 1:
            mask_of(where, batch.slice(0, 0))  # of no event it can be computed, unless it does not fit the fields
            return np.zeros(batch.num_rows, np.bool_)
        half = batch.num_rows // 2
        return np.concatenate([holds(where, part) for part in (batch.slice(0, half), batch.slice(half))])
