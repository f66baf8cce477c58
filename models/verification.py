"""Verification: scores that were logged are computed again from the past, and compared with what was served.

    1. load     the versions that served, from the registry, each over the views that its own definition declares
    2. recall   the rows that were read, as they were then (`feature_actors.recall`)
    3. compare  features bit by bit, and what was unknown. A read may have come between two events of one request, so
                what differs is recalled after each event of its key in the record, and the first that agrees is taken
    4. predict  from what was recalled, and compare the results

A score is equal, different, or missing: it cannot be computed again, since events of it have expired, do not show any
more what has been forgotten, or its version is gone. A result is equal if it is the same JSON, or differs in rounding
alone: beside other rows a product of matrices may be rounded otherwise.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.feature_actors.erasure import replaced_fields
from millpond.feature_actors.errors import DeclarationError, MillpondError
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.folder import Folder
from millpond.feature_actors.log.part import DAY_MS, expired
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import FeatureRows
from millpond.feature_actors.recall import GONE, LATER, NOT_ASKED, Recalled, RowReads, events_of, recall
from millpond.feature_actors.view import FeatureView
from millpond.models.model import LoadedModel, Model
from millpond.models.registry import Registry, VersionRetired
from millpond.models.score_rows import Agreement, CannotRead, ScoreRows, added_views, layout_with, rows_at

__all__ = ["CHUNK", "Counts", "ScoreDifference", "Verification", "verify"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
#: Model, version and digest, and which of its views had come while the cluster ran.
Id = tuple[str, str, str, tuple[str, ...]]
Told = Callable[[int, str], None]

#: So many scores are held, and recalled in one go through the past: it is gone through once for each.
CHUNK = 50_000
_PREDICT_ROWS = 1_024
_TRIES_MAX = 1 << 20
_EVENTS_SHOWN = 3
#: Results that are so near differ in rounding.
_REL, _ABS = 1e-9, 1e-12
_NEVER = -(2**63)
_EXPIRED = "events that it saw have expired"
_FORGOTTEN = "events that it saw do not show any more what has been forgotten"

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Counts:
    equal: int = 0
    different: int = 0
    missing: int = 0

    def add(self, outcome: str, n: int = 1) -> None:
        setattr(self, outcome, getattr(self, outcome) + int(n))


@dataclass(frozen=True)
class ScoreDifference:
    """A score that differs. what: in words, feature by feature. rows: where those stood that differ, how many events
    had been applied to each, and the newest of these."""

    id: str
    model: str
    version: str
    key: dict[str, Any]
    served_ms: int
    as_of_ms: int
    what: list[str]
    rows: list[dict[str, Any]]


@dataclass
class Verification:
    """What was found. views: by name. models: by `model@version`. within_request: scores that are equal and were read
    between two events of one request. rounded: those whose results are equal but for rounding. why_missing: reasons,
    and of how many scores. differences: the first ones."""

    scores: Counts = field(default_factory=Counts)
    views: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    models: dict[str, Counts] = field(default_factory=lambda: defaultdict(Counts))
    within_request: int = 0
    rounded: int = 0
    why_missing: Counter[str] = field(default_factory=Counter)
    differences: list[ScoreDifference] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return dict(msgspec.to_builtins(self))


def verify(
    past: Past,
    registry: Registry,
    scores: Iterable[pa.Table],
    *,
    differences_max: int = 10,
    chunk: int = CHUNK,
    progress: Told = lambda scores, what: None,
) -> Verification:
    """Verify logged scores, as `score_log.read_scores` gives them.

    chunk: about how many are held at a time. progress: told how many more scores are done, and what is being done.
    Runs the code of the models. Raises what reading the past and the registry does.
    """
    verifier = _Verifier(past, registry, differences_max, progress)
    for some in _chunks(scores, chunk):
        verifier.verify(some.sort_by("served_ms"))
        progress(len(some), "")
    verifier.found.differences.sort(key=lambda one: one.served_ms)
    return verifier.found


def _chunks(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= rows:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


class _Views:
    """Views that stand side by side in one layout, and models that read them."""

    def __init__(self) -> None:
        self._views: dict[str, FeatureView] = {}
        self._added: set[str] = set()
        self._layout: Layout | None = None
        self.models: dict[Id, tuple[Model, Any]] = {}

    def take(self, one: Id, model: Model, artifacts: Any) -> bool:
        """Take a model in, if its views can stand beside these."""
        own = {f.view.name: f.view for f in (*model.features, *model.reads)}
        if any((name in one[3]) != (name in self._added) for name in own if name in self._views):
            return False
        if any(_content(view) != _content(self._views.get(name)) for name, view in own.items()):
            views, added = [*self._views.values(), *own.values()], {*self._added, *one[3]}
            try:
                self._layout = layout_with(views, added)
            except DeclarationError:
                return False
            self._views, self._added = {**self._views, **own}, added
        self.models[one] = model, artifacts
        return True

    @property
    def layout(self) -> Layout:
        assert self._layout is not None
        return self._layout


def _content(view: FeatureView | None) -> list[str] | None:
    return None if view is None else [feature.wire_name for feature in view]


class _Compared:
    """Scores of one version, and what has been recalled of them."""

    def __init__(self, of: Id, loaded: LoadedModel, scores: ScoreRows, recalled: Recalled) -> None:
        self.of, self.loaded, self.scores, self.recalled = of, loaded, scores, recalled
        self.program = scores.plan.program
        self.within_request: set[int] = set()
        self.compare()

    def compare(self) -> None:
        """Compare what has been recalled with what was logged. Raises `FeatureFailed`."""
        self.rows: FeatureRows = self.scores.plan.rows(self.recalled.answer)
        self.agrees: Agreement = self.scores.agreement(self.rows)

    # -- a read between two events of a request

    def tries(self) -> list[tuple[int, int, int]]:
        """Return (score, part, k): what differs and may have been read after the first k events of its key."""
        return [
            (i, part, k)
            for i, part in np.argwhere(self.recalled.events > 1).tolist()
            if not self.agrees.views[i, self.program.views_of_part[part]].all()
            for k in range(1, self.recalled.events[i, part])
        ][:_TRIES_MAX]

    def tried(self, tries: Sequence[tuple[int, int, int]]) -> RowReads:
        """Return what is to be recalled for some tries."""
        reads = self.scores.take(np.array([i for i, _, _ in tries], np.int64)).reads()
        offsets, kth = np.full_like(reads.offsets, NOT_ASKED), np.zeros_like(reads.kth)
        for row, (i, part, k) in enumerate(tries):
            offsets[row, part], kth[row, part] = self.scores.offsets[i, part], k
        return replace(reads, offsets=offsets, kth=kth)

    def take_tries(self, tries: Sequence[tuple[int, int, int]], found: Recalled) -> None:
        """Take what agrees in place of what did not."""
        of = np.array([i for i, _, _ in tries], np.int64)
        agrees = self.scores.take(of).agreement(self.scores.plan.rows(found.answer)).views
        taken: set[tuple[int, int]] = set()
        for row, (i, part, _) in enumerate(tries):
            if (i, part) not in taken and agrees[row, self.program.views_of_part[part]].all():
                taken.add((i, part))
                self.recalled.take(part, np.array([i]), found.answer, np.array([row]))
        if taken:
            self.compare()
            self.within_request = {i for i, _ in taken if self.agrees.views[i].all()}

    # -- results

    def results(self, at: Ints) -> list[Any]:
        """Return what the model predicts for some scores, or for one the exception that it raises."""
        keys = {name: [column[i] for i in at.tolist()] for name, column in self.scores.keys.items()}
        try:
            return self.loaded.predict(rows_at(self.rows, at), keys)
        except MillpondError as error:
            return [error] * len(at)

    def wrong_results(self, at: Ints) -> tuple[dict[int, str], int]:
        """Predict for scores whose features agree; return how which results differ, and how many by rounding alone."""
        wrong, rounded = {}, 0
        if self.loaded.two_stage:  # where the rows stood that it read besides is not logged
            return {}, 0
        for start in range(0, len(at), _PREDICT_ROWS):
            some = at[start : start + _PREDICT_ROWS]
            for i, result in zip(some.tolist(), self.results(some), strict=True):
                logged = self.scores.results[i]
                if _text(result) != logged:  # then as a request by itself
                    (result,) = self.results(np.array([i]))
                if (text := _text(result)) != logged:
                    if not isinstance(result, MillpondError) and _near(_decode(logged), _decode(text)):
                        rounded += 1
                    else:
                        wrong[i] = f"result: logged {logged:.200}, recomputed {text:.200}"
        return wrong, rounded

    # -- words

    def parts_of(self, views: Sequence[int]) -> list[int]:
        return [part for part, own in enumerate(self.program.views_of_part) if set(own.tolist()) & set(views)]

    def words(self, i: int, views: Sequence[int]) -> list[str]:
        """Say what differs of a score in some of its views."""
        plan, at, words = self.scores.plan, np.array([i]), []
        names = {self.program.view_names[view] for view in views}
        for part in self.parts_of(views):
            table, outcome = self.program.tables[part].name, self.recalled.outcome[i, part]
            if outcome in (GONE, LATER):
                what = (
                    "is no event of the key" if outcome == GONE else "the row is later than the time it was read as of"
                )
                words.append(f"{table}: at offset {self.scores.offsets[i, part]} {what}")
        (logged,), (found,) = (plan.named_values(rows_at(rows, at)) for rows in (self.scores.rows, self.rows))
        for number, feature in enumerate(plan.features):
            if feature.view.name in names and not self.agrees.features[i, number]:
                name = feature.full_name
                words.append(f"`{name}`: logged {logged[name]!r}, recomputed {found[name]!r}")
        for view in views:
            if not self.agrees.known[i, view]:
                name = self.program.view_names[view]
                knows = "did not know" if name in self.scores.rows.unknown[i] else "knew"
                words.append(f"view `{name}`: it {knows} the id, recomputed otherwise")
        return words


class _Verifier:
    def __init__(self, past: Past, registry: Registry, differences_max: int, progress: Told) -> None:
        self._past, self._registry = past, registry
        self._differences_max, self._progress = differences_max, progress
        self._expired_ms: dict[str, int] = {}
        self.found = Verification()

    def verify(self, scores: pa.Table) -> None:
        """Verify some scores, as the module says."""
        rows: dict[Id, list[int]] = defaultdict(list)
        columns = [scores[name].to_pylist() for name in ("model", "version", "digest")]
        ids: Iterable[Id] = zip(*columns, added_views(scores), strict=True)
        for i, one in enumerate(ids):
            rows[one].append(i)
        of_version = {one: scores.take(pa.array(of)) for one, of in rows.items()}
        for group in self._groups(of_version):
            compared = self._compared(group, of_version)
            self._try_within_requests(group.layout, compared)
            for each in compared:
                self._tell(group.layout, each)

    def _recall(self, layout: Layout, reads: Sequence[RowReads]) -> list[Recalled]:
        return recall(self._past, layout, reads, lambda records: self._progress(0, f"{records:,} records"))

    def _missing(self, one: Id, n: int, why: str) -> None:
        self.found.scores.add("missing", n)
        self.found.models[f"{one[0]}@{one[1]}"].add("missing", n)
        self.found.why_missing[why] += n

    # -- 1. load

    def _groups(self, of_version: Mapping[Id, pa.Table]) -> list[_Views]:
        """Return the versions in groups whose views can be in one layout."""
        groups: list[_Views] = []
        for one, scores in of_version.items():
            try:
                model, artifacts = self._declared(one)
            except VersionRetired:
                self._missing(one, len(scores), "its version has been retired")
            except MillpondError as error:
                self._missing(one, len(scores), error.message)
            else:
                if not any(group.take(one, model, artifacts) for group in groups):
                    groups.append(_Views())
                    assert groups[-1].take(one, model, artifacts)
        return groups

    def _declared(self, one: Id) -> tuple[Model, Any]:
        name, version, digest, _ = one
        known = self._registry.version(name, version)
        if known.digest != digest:
            raise MillpondError("its version has another content in the registry than the one that served")
        (model,) = (m for m in self._registry.definition(known).declared().models if m.name == name)
        return replace(model, version=version), self._registry.artifacts_dir(known)

    def _compared(self, group: _Views, of_version: Mapping[Id, pa.Table]) -> list[_Compared]:
        """Load a group's versions, and recall and compare their scores."""
        loaded: list[tuple[Id, LoadedModel, ScoreRows]] = []
        for one, (model, artifacts) in group.models.items():
            try:
                of = LoadedModel(model, group.layout, artifacts)
                loaded.append((one, of, ScoreRows.of(of.plan, of_version[one])))
            except CannotRead as error:
                self._missing(one, len(of_version[one]), error.message)
            except Exception as error:  # of the model's own code
                self._missing(one, len(of_version[one]), f"its version does not load: {type(error).__name__}: {error}")
        compared = []
        recalled = self._recall(group.layout, [scores.reads() for _, _, scores in loaded])
        for (one, of, scores), what in zip(loaded, recalled, strict=True):
            try:
                compared.append(_Compared(one, of, scores, what))
            except MillpondError as error:
                self._missing(one, scores.n, error.message)
        return compared

    # -- 3. compare

    def _try_within_requests(self, layout: Layout, compared: Sequence[_Compared]) -> None:
        tries = [(one, of) for one in compared if (of := one.tries())]
        found = self._recall(layout, [one.tried(of) for one, of in tries]) if tries else []
        for (one, of), what in zip(tries, found, strict=True):
            one.take_tries(of, what)

    # -- counts and names

    def _tell(self, layout: Layout, one: _Compared) -> None:
        """Count the scores of a version, and name the first that differ."""
        found, agrees = self.found, one.agrees.views
        shows_tokens = ~agrees & self._may_show_tokens(one)
        lost = shows_tokens | (~agrees & self._may_lack(one))
        for view, name in enumerate(one.program.view_names):
            found.views[name].add("equal", agrees[:, view].sum())
            found.views[name].add("missing", lost[:, view].sum())
            found.views[name].add("different", (~agrees & ~lost)[:, view].sum())
        wrong, rounded = one.wrong_results(np.flatnonzero(agrees.all(axis=1)))
        found.rounded += rounded
        found.within_request += len(one.within_request - wrong.keys())
        of_model = found.models[f"{one.of[0]}@{one.of[1]}"]
        named: list[tuple[int, list[str], list[int]]] = []
        for i in range(one.scores.n):
            views = np.flatnonzero(~agrees[i] & ~lost[i]).tolist()
            outcome = "different" if views or i in wrong else "missing" if lost[i].any() else "equal"
            found.scores.add(outcome)
            of_model.add(outcome)
            if outcome == "missing":
                found.why_missing[_FORGOTTEN if shows_tokens[i].any() else _EXPIRED] += 1
            if outcome == "different" and len(found.differences) + len(named) < self._differences_max:
                what = one.words(i, views) if views else [wrong[i]]
                named.append((i, what, one.parts_of(views) if views else list(range(one.program.parts))))
        self._name(layout, one, named)

    def _may_lack(self, one: _Compared) -> Bools:
        """Return which views of which scores may have seen events that have expired, bool [n, views]."""
        lack = np.zeros(one.agrees.views.shape, np.bool_)
        for number, name in enumerate(one.program.view_names):
            view = one.scores.plan.views[name]
            before_ms, reach_ms = self._expired_before_ms(view.source.name), _reach_ms(view)
            if before_ms > _NEVER:
                lack[:, number] = True if reach_ms is None else one.rows.as_of < before_ms + reach_ms
        return lack

    def _may_show_tokens(self, one: _Compared) -> Bools:
        """Return which views of which scores may have read values that have been forgotten since, bool [n, views]."""
        may = np.zeros(one.agrees.views.shape, np.bool_)
        for number, name in enumerate(one.program.view_names):
            view = one.scores.plan.views[name]
            for tombstone in self._past.tombstones():
                if view.reads & set(replaced_fields(view.source, tombstone.field)):
                    may[:, number] |= (one.rows.as_of <= tombstone.done_ms) | (not tombstone.done)
        return may

    def _expired_before_ms(self, source: str) -> int:
        """Return before which arrival events of a source may have expired, `_NEVER` if none have."""
        if source not in self._expired_ms:
            days = [_NEVER]
            if self._past.history_uri is not None:
                gone = expired(Folder(self._past.history_uri), source)
                days += [gone.before_day, *(day + 1 for day in gone.deleting)]
            self._expired_ms[source] = max(days) * DAY_MS if max(days) > _NEVER else _NEVER
        return self._expired_ms[source]

    def _name(self, layout: Layout, one: _Compared, named: Sequence[tuple[int, list[str], list[int]]]) -> None:
        """Take down scores that differ, with the newest events of their rows."""
        if not named:
            return
        scores, reads = one.scores, one.scores.reads()
        wanted = [
            (one.program.tables[part], reads.hashes[one.program.key_of_part[part], i])
            for i, _, parts in named
            for part in parts
        ]
        events = iter(events_of(self._past, layout, wanted))
        for i, what, parts in named:
            rows = []
            for part in parts:
                offset = int(scores.offsets[i, part])
                applied = next(events).up_to(offset)
                newest = [applied.plain(k) for k in range(max(0, applied.n - _EVENTS_SHOWN), applied.n)]
                place = {"shard": int(scores.shards[i, part]), "offset": offset}
                rows.append({"table": one.program.tables[part].name, **place, "events": applied.n, "newest": newest})
            self.found.differences.append(
                ScoreDifference(
                    scores.ids[i],
                    *one.of[:2],
                    scores.key(i),
                    int(scores.served_ms[i]),
                    int(scores.rows.as_of[i]),
                    what,
                    rows,
                )
            )


def _reach_ms(view: FeatureView) -> int | None:
    """Return how long before an as-of an event may have arrived that a view sees, None if for ever."""
    reaches = [feature.reach_ms for feature in view if feature.derived is None]
    return None if None in reaches else max(reach for reach in reaches if reach is not None)


def _text(result: Any) -> str:
    return str(result) if isinstance(result, MillpondError) else _encode(result).decode()


def _near(one: Any, other: Any) -> bool:
    """Return whether two results are the same but for rounding."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_near, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_near(one[name], other[name]) for name in one)
    if type(one) in (int, float) and type(other) in (int, float):
        return math.isclose(one, other, rel_tol=_REL, abs_tol=_ABS)
    return type(one) is type(other) and bool(one == other)
