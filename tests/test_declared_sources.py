# ruff: noqa: E501  (messages stand whole)
"""Sources change only as old records can be read: what is allowed, what is refused and how it is said."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.feature_actors import Field, Source
from millpond.feature_actors.declared_sources import DeclaredSources
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.manifest import ManifestError

FIELDS = {"id": "string", "at": "timestamp[ms, UTC]", "n": "int64", "may": Field("float64", optional=True),
          "said": Field("string", default="-"), "when": Field("timestamp[ms, UTC]", default=datetime(2020, 1, 1, tzinfo=UTC))}  # fmt: skip


def source(version: int = 1, name: str = "paid", **changes: Any) -> Source:
    """The source with other fields (None: removed), or with another `event_id`, `event_time`, `owner`, ..."""
    known = {"owner", "about", "retention", "event_id", "event_time"}
    options = {
        "owner": "shop",
        "event_id": "id",
        "event_time": "at",
        **{k: v for k, v in changes.items() if k in known},
    }
    fields = {**FIELDS, **{k: v for k, v in changes.items() if k not in known}}
    return Source(name, version=version, fields={k: v for k, v in fields.items() if v is not None}, **options)


def declare(directory: Path, *sources: Source) -> None:
    """As a start does it."""
    declared = DeclaredSources(directory)
    declared.keep(declared.check(sources))


ALLOWED = [
    ("the same", source()),
    ("the same in a later version", source(2)),
    ("another owner, about and retention", source(owner="other", about="x", retention="9d")),
    ("fields in another order", Source("paid", owner="shop", fields=dict(reversed(FIELDS.items())), event_id="id", event_time="at")),
    ("the same default, written otherwise", source(when=Field("timestamp[ms, UTC]", default=1_577_836_800_000))),
    ("an optional field more", source(2, more=Field("int8", optional=True))),
    ("a field with a default more", source(7, more=Field("bool", default=False))),
    ("what was required may lack", source(2, n=Field("int64", optional=True))),
    ("what was required has a default", source(2, n=Field("int64", default=0))),
    ("personal", source(2, n=Field("int64", personal=True))),
]  # fmt: skip

NEW = "that is a new source: give it another name"
REFUSED = [
    (source(more=Field("int8", optional=True)), "field `more` was added, and version is 1 still; declare the source with `version=2`"),
    (source(n=Field("int64", optional=True)), "field `n` has changed, and version is 1 still; declare the source with `version=2`"),
    (source(n=Field("int64", personal=True)), "field `n` has changed, and version is 1 still; declare the source with `version=2`"),
    (source(2, n=None), f"field `n` was removed; {NEW}"),
    (source(2, n="int32"), f"field `n` was `int64` and is `int32`; {NEW}"),
    (source(2, n="float64"), f"field `n` was `int64` and is `float64`; {NEW}"),
    (source(2, may="float64"), f"field `may` was optional and is not, and older events may lack it; {NEW}"),
    (source(2, may=Field("float64", optional=True, default=0)), f"field `may` had the default None and has 0.0, and older events that lack it would be read otherwise; {NEW}"),
    (source(2, said=Field("string", default="")), f"field `said` had the default '-' and has '', and older events that lack it would be read otherwise; {NEW}"),
    (source(2, said="string"), f"field `said` had the default '-' and has None, and older events that lack it would be read otherwise; {NEW}"),
    (source(2, more="int8"), "field `more` was added, and older events lack it; make it optional, give it a default, or give the source another name"),
    (source(2, event_id=None), f"event_id was `id` and is none; {NEW}"),
    (source(2, event_id="n"), f"event_id was `id` and is `n`; {NEW}"),
    (source(2, event_time="at2", at2="timestamp[ms, UTC]"), f"event_time was `at` and is `at2`; {NEW}"),
]  # fmt: skip


@pytest.mark.parametrize("after", [a[1] for a in ALLOWED], ids=[a[0] for a in ALLOWED])
def test_what_old_records_can_be_read_by_is_taken_and_is_what_counts_from_then_on(
    after: Source, tmp_path: Path
) -> None:
    declare(tmp_path, source())
    declare(tmp_path, after)
    kept = DeclaredSources(tmp_path).sources["paid"]
    assert (kept.version, set(kept.fields)) == (after.version, set(after.fields))
    declare(tmp_path, after)


@pytest.mark.parametrize(("after", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_what_old_records_cannot_be_read_by_is_refused_and_nothing_is_written(
    after: Source, message: str, tmp_path: Path
) -> None:
    declare(tmp_path, source())
    before = (tmp_path / "sources.json").read_bytes()
    fine = source(name="other")
    with pytest.raises(DeclarationError, match=f"^{re.escape(f'source `paid`: {message}')}$"):
        declare(tmp_path, fine, after)
    assert (tmp_path / "sources.json").read_bytes() == before
    declare(tmp_path, fine, source())


def test_a_version_is_never_lowered(tmp_path: Path) -> None:
    declare(tmp_path, source(3))
    message = "source `paid`: version was 3 and is 2; a version is never lowered: declare 3 or more, or give the source another name"
    with pytest.raises(DeclarationError, match=f"^{re.escape(message)}$"):
        declare(tmp_path, source(2))
    declare(tmp_path, source(3))


def test_a_source_that_is_not_declared_any_more_is_kept_and_judged_when_it_is_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declare(tmp_path, source(), source(name="other"))
    with caplog.at_level(logging.WARNING):
        declare(tmp_path, source())
    assert caplog.messages == [
        "source `other` is not declared any more; its events stay, and are read again when it is declared"
    ]
    assert set(DeclaredSources(tmp_path).sources) == {"paid", "other"}
    with pytest.raises(DeclarationError, match=r"^source `other`: field `n` was removed"):
        declare(tmp_path, source(2, name="other", n=None))
    declare(tmp_path, source(), source(name="other"))


def test_the_file_is_what_it_says(tmp_path: Path) -> None:
    declare(
        tmp_path,
        Source(
            "paid",
            owner="shop",
            fields={"at": "timestamp[ms, UTC]", "n": Field("double", default=1, personal=True)},
            event_time="at",
        ),
    )
    assert json.loads((tmp_path / "sources.json").read_text()) == {
        "format": 1,
        "sources": {
            "paid": {
                "version": 1, "event_id": None, "event_time": "at",
                "fields": {
                    "at": {"type": "timestamp[ms, UTC]", "optional": False, "default": None, "personal": False},
                    "n": {"type": "float64", "optional": False, "default": 1.0, "personal": True},
                },
            },
        },
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["sources.json"]


def test_a_file_that_is_damaged_or_of_a_later_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    declare(tmp_path, source())
    path = tmp_path / "sources.json"
    whole = json.loads(path.read_text())
    later = whole | {"format": 2, "sources": 5}
    for damage in ("", "{", "[]", "{}", '{"format": 1}', "\0" * 20, json.dumps(whole | {"more": 1})):
        path.write_text(damage)
        with pytest.raises(ManifestError, match=re.escape(f"`{path}` cannot be read: ")):
            DeclaredSources(tmp_path)
        assert path.read_text() == damage
    path.write_text(json.dumps(later))
    with pytest.raises(ManifestError, match=r"has format 2; this version reads 1; start the version that wrote it$"):
        DeclaredSources(tmp_path)


# -- the law behind the rules

_DEFAULTS: dict[str, Any] = {"int64": 7, "float64": 0.5}
_VALUES: dict[str, Any] = {"int64": 3, "float64": 1.5}


@st.composite
def some_field(draw: st.DrawFn) -> Field | None:
    kind = draw(st.sampled_from(["int64", "int64", "int64", "float64"]))
    default = draw(st.sampled_from([None, None, _DEFAULTS[kind], 2 * _DEFAULTS[kind]]))
    return draw(st.sampled_from([Field(kind, draw(st.booleans()), default)] * 9 + [None]))


#: Changes of one source by people who do not care, one after the other: a field, and what it is to be.
changes = st.lists(st.tuples(st.sampled_from("ab"), some_field()), min_size=3, max_size=8)


def written_by(source: Source) -> list[pa.RecordBatch]:
    """Records as `decode` makes them: one with every field, and one that lacks what may be lacking."""
    whole = {n: 0 if n == "at" else _VALUES[f.type] for n, f in source.fields.items()}
    least = {n: f.default if f.optional or f.default is not None else whole[n] for n, f in source.fields.items()}
    return [pa.RecordBatch.from_pylist([row], schema=source.schema) for row in (whole, least)]


@given(changes)
def test_every_record_that_was_ever_written_is_read_by_every_later_declaration_and_always_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, Field | None]]
) -> None:
    directory = tmp_path_factory.mktemp("law")
    records: list[pa.RecordBatch] = []
    known: list[dict[str, Any]] = []
    fields: dict[str, Any] = {"at": "timestamp[ms, UTC]"}
    for version, (name, changed) in enumerate(changes, 1):
        after = {n: f for n, f in {**fields, name: changed}.items() if f is not None}
        one = Source("paid", owner="shop", fields=after, event_time="at", version=version)
        try:
            declare(directory, one)
        except DeclarationError:
            continue
        fields = after
        for at, record in enumerate(records):
            read = one.upgraded(record)
            read.validate(full=True)
            assert read.schema == one.schema
            assert all(f.nullable or read.column(f.name).null_count == 0 for f in one.schema)
            (row,) = read.to_pylist()
            # What was read once is read so ever after.
            assert row.items() >= known[at].items()
            known[at] = row
        for record in written_by(one):
            records.append(record)
            known.append(record.to_pylist()[0])
