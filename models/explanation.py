"""Explanation: what made the features of one score, down to the raw events, from the past of the cluster.

The values come from a replay of the entity's own events alone, up to where each row stood; for a score that was served
they must be the ones that were, and the explanation says whether they are. Which events a feature saw is told from its
declaration: those of its entity that satisfy `where`, came in time, and lie inside its window.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millpond.feature_actors.errors import MillpondError, TooLarge, error_to_wire
from millpond.feature_actors.layout import Layout
from millpond.feature_actors.log.part import DAY_MS
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import FeatureRows, ReadPlan
from millpond.feature_actors.reader import MemoryReader
from millpond.feature_actors.recall import EntityEvents, Recalled, RowReads, events_of, read_part
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.read import NO_CLOCK
from millpond.feature_actors.view import Feature, holds
from millpond.feature_actors.windows import exact_past_ms
from millpond.models.model import LoadedModel
from millpond.models.registry import Registry
from millpond.models.score_log import read_scores
from millpond.models.score_rows import ScoreRows, added_views, layout_with

__all__ = ["ANSWER_BYTES_MAX", "ExplainRequest", "explain", "explained", "logged_score", "seen_by"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

#: Of an answer over HTTP: raw events may be long.
ANSWER_BYTES_MAX = 16 << 20
_ONE_SHARD = ShardMap.even(1, 1)
_NEVER_RECLAIM_MS = 1 << 60
_INT64 = re.compile(r"-?[0-9]{1,19}")


def explain(
    past: Past,
    registry: Registry,
    model: str,
    version: str,
    key: Mapping[str, Any],
    *,
    served: pa.Table | None = None,
    at_ms: int | None = None,
    events_max: int = 5,
) -> dict[str, Any]:
    """Explain a score of an id by a version.

    served: the score, in `score_log.SCHEMA`; without one it is computed as of `at_ms`, from what had arrived by then,
    or if there is no such time as of the newest arrival of all. events_max: so many events of a feature are shown.
    Returns what JSON holds; times are in ms. Raises `BadRequest` for a key that is none, `NotFound`, `VersionRetired`,
    and what reading the past does.
    """
    known = registry.version(model, version)
    (declared,) = (m for m in registry.definition(known).declared().models if m.name == model)
    added = () if served is None else added_views(served)[0]
    layout = layout_with({f.view.name: f.view for f in (*declared.features, *declared.reads)}.values(), added)
    loaded = LoadedModel(replace(declared, version=version), layout, registry.artifacts_dir(known))
    plan = loaded.plan
    keys = plan.key_columns([key], batch=False)
    entity = _Entity(past, layout, plan, keys)
    scores = None if served is None else ScoreRows.of(plan, served)
    if scores is not None:
        rows, equal = entity.as_served(scores)
    else:
        rows, equal = entity.as_of(_newest_arrival(past) if at_ms is None else at_ms), None
    result = None if loaded.two_stage else loaded.predict(_copy(rows), keys)[0]
    logged = None if scores is None else msgspec.json.decode(scores.results[0])
    return {
        "model": model,
        "version": version,
        "owner": known.owner,
        "key": dict(key),
        "id": "" if scores is None else scores.ids[0],
        "served_ms": None if scores is None else int(scores.served_ms[0]),
        "as_of_ms": int(rows.as_of[0]),
        "result": logged if scores is not None else result,
        "recomputed": result,
        "equal": equal,
        "unknown": rows.unknown[0],
        "features": entity.features(rows, events_max),
    }


def logged_score(
    history_uri: str, model: str, version: str | None, key: Mapping[str, Any], until_ms: int
) -> pa.Table | None:
    """Return the newest logged score of an id that was served up to a time, None if there is none.

    version: None for whichever answered, so not a shadow, which nobody had an answer of. key: as
    `ReadPlan.key_columns` has it.
    """
    size = len(msgspec.json.encode(key).decode())
    best: pa.Table | None = None
    for table in read_scores(history_uri, model=model, version=version, until_ms=until_ms + 1, newest_first=True):
        # The newest is of the last date that has one; of which of its files, nobody knows.
        if best is not None and _served_ms(table) // DAY_MS < _served_ms(best) // DAY_MS:
            break
        # In whatever order a version has the fields, the text is as long.
        wanted = pc.equal(pc.utf8_length(table["key"]), size)
        if version is None:
            wanted = pc.and_(wanted, pc.not_equal(table["role"], "shadow"))
        likely = table.filter(wanted)
        is_mine = [msgspec.json.decode(text) == key for text in likely["key"].to_pylist()]
        mine = likely.filter(pa.array(is_mine, pa.bool_())).sort_by("served_ms")
        if len(mine) and (best is None or _served_ms(mine) > _served_ms(best)):
            best = mine.slice(len(mine) - 1)
    return best


def _served_ms(scores: pa.Table) -> int:
    return int(scores["served_ms"][-1].as_py())


class _Entity:
    """The events of an id, by part of the plan: `all` of them, and those that count, `at`."""

    def __init__(self, past: Past, layout: Layout, plan: ReadPlan, keys: Mapping[str, Sequence[Any]]) -> None:
        self.layout, self.plan = layout, plan
        self.hashes = plan.question(keys, 1, None, None).hashes
        program = plan.program
        parts = zip(program.tables, program.key_of_part, strict=True)
        self.all = self.at = events_of(past, layout, [(table, self.hashes[key, 0]) for table, key in parts])

    def as_served(self, scores: ScoreRows) -> tuple[FeatureRows, bool]:
        """Return the features as of a score that was served, and whether they are the ones that were."""
        as_of_ms = int(scores.rows.as_of[0])
        self.at = [events.up_to(of) for events, of in zip(self.all, scores.offsets[0].tolist(), strict=True)]
        for part, whole in enumerate(self.at):
            views = self.plan.program.views_of_part[part]
            before = int(np.searchsorted(whole.offsets, scores.offsets[0, part]))
            for n in range(whole.n, before, -1):  # it may have been read between two events of one request
                self.at[part] = whole.first(n)
                if scores.agreement(self._replayed(as_of_ms)).views[0, views].all():
                    break
            else:
                self.at[part] = whole
        rows = self._replayed(as_of_ms)
        return rows, bool(scores.agreement(rows).views.all())

    def as_of(self, at_ms: int) -> FeatureRows:
        """Return the features as of a time, by what had arrived."""
        self.at = [events.where(events.arrivals <= at_ms) for events in self.all]
        times = [of.times_ms for of in self.at]
        return self._replayed(max([at_ms, *(int(of.max()) for of in times if len(of))]))

    def _replayed(self, as_of_ms: int) -> FeatureRows:
        program, as_of = self.plan.program, np.array([as_of_ms], np.int64)
        nothing = np.zeros((1, program.parts), np.int64)
        recalled = Recalled.nothing(RowReads(program, self.hashes, as_of, nothing, nothing, nothing))
        for part, (table, events) in enumerate(zip(program.tables, self.at, strict=True)):
            shard = Shard(self.layout, _ONE_SHARD, 0, reclaim_margin_ms=_NEVER_RECLAIM_MS)
            shard.apply(table.source.name, events.batch, events.arrivals, NO_CLOCK)
            reader = MemoryReader(_ONE_SHARD, [0])
            reader.attach(0, shard.memory)
            answer = read_part(reader, program, part, self.hashes, as_of)
            recalled.take(part, np.array([0]), answer, np.array([0]))
        return self.plan.rows(recalled.answer)

    # -- feature by feature

    def features(self, rows: FeatureRows, events_max: int) -> list[dict[str, Any]]:
        (values,) = self.plan.named_values(rows)
        told = []
        for feature in self.plan.features:
            part = self.plan.program.tables.index(self.layout.table_of(feature.view))
            events = self.at[part]
            saw = np.flatnonzero(self._seen(feature, events, int(rows.as_of[0])))
            times = events.times_ms
            newest = saw[np.argsort(times[saw], kind="stable")[::-1][:events_max]].tolist()
            told.append({
                "feature": feature.full_name,
                "value": values[feature.full_name],
                "definition": feature.definition,
                "derived_from": [one.full_name for one in feature.of],
                "owner": feature.view.owner,
                "events": len(saw),
                "newest": [events.plain(i) for i in newest],
            })  # fmt: skip
        return told

    def _seen(self, feature: Feature, events: EntityEvents, as_of_ms: int) -> Bools:
        if feature.derived is not None:
            of = [self._seen(one, events, as_of_ms) for one in feature.of]
            return np.any(of, axis=0)  # type: ignore[no-any-return]
        return seen_by(feature, events.batch, events.arrivals, as_of_ms)


def seen_by(feature: Feature, batch: pa.RecordBatch, arrivals: Ints, as_of_ms: int) -> Bools:
    """Return which events of an entity a feature that is not derived sees as of a time, bool [n]."""
    kept, times = feature.kept, feature.view.source.times_ms(batch)
    mine = np.ones(len(times), np.bool_)
    if feature.where is not None and len(times):
        mine = holds(feature.where, batch)
    if kept.window_ms is not None:
        width, start = kept.tile_width_ms or 1, as_of_ms - kept.window_ms
        kept_ms = kept.window_ms + (exact_past_ms(kept.window_ms) if kept.exact else 0)
        start = start + 1 if kept.exact else start // width * width
        in_time = times // width >= (arrivals - kept_ms) // width
        return mine & in_time & (start <= times) & (times <= as_of_ms)
    if kept.ttl_ms is None:
        return mine
    seen, newest = np.zeros(len(times), np.bool_), None
    for i in np.flatnonzero(mine & (times >= arrivals - kept.ttl_ms)).tolist():
        if newest is not None and newest < arrivals[i] - kept.ttl_ms:  # forgotten before this one came
            seen[:] = False
        newest = int(times[i]) if newest is None or not seen.any() else max(newest, int(times[i]))
        seen[i] = True
    return seen if newest is not None and newest >= as_of_ms - kept.ttl_ms else np.zeros_like(seen)


def _newest_arrival(past: Past) -> int:
    arrivals = [int(record.arrivals.max()) for n in range(past.shards) for _, record in past.records(n)]
    return max(arrivals, default=0)


def _copy(rows: FeatureRows) -> FeatureRows:
    return FeatureRows(rows.matrix.copy(), rows.as_of, rows.unknown, rows.texts)


# -- in a process of its own: it goes through all of the past, and runs the code of the model


class ExplainRequest(msgspec.Struct):
    """What to explain. served: the score, as an Arrow IPC stream. Without it, at_ms says of when: the newest score that
    was logged up to then, by `version` if `only_version`; if there is none, the one that there would have been."""

    directory: str
    history_uri: str
    model: str
    version: str
    key: dict[str, Any]
    served: bytes | None = None
    at_ms: int | None = None
    only_version: bool = False
    events_max: int = 5


def explained(request: ExplainRequest) -> dict[str, Any]:
    """Answer a request from what is on disk; see `explain`."""
    past = Past(Path(request.directory), request.history_uri)
    with closing(Registry(Path(request.directory) / "registry")) as registry:
        kinds = registry.version(request.model, request.version).key_fields
        whole = {n: int(v) for n, v in request.key.items() if kinds.get(n) == "int64" and _INT64.fullmatch(str(v))}
        key, version, served = {**request.key, **whole}, request.version, None
        if request.served is not None:
            served = pa.ipc.open_stream(request.served).read_all()
        elif request.at_ms is not None:
            only = version if request.only_version else None
            served = logged_score(request.history_uri, request.model, only, key, request.at_ms)
            version = version if served is None else served["version"][0].as_py()
        return explain(
            past, registry, request.model, version, key, served=served, at_ms=request.at_ms,
            events_max=request.events_max,
        )  # fmt: skip


def _answer(request: ExplainRequest) -> bytes:
    answer = msgspec.json.encode(explained(request))
    if len(answer) > ANSWER_BYTES_MAX:
        raise TooLarge(
            f"explain: the answer has {len(answer):,} bytes; allowed are {ANSWER_BYTES_MAX:,}; ask for fewer events"
        )
    return answer


def _main() -> None:
    """Read a request from standard input, write the answer as JSON, or an error, to standard output, in MessagePack.

    The answer is JSON already, since who asks has others to serve than to write it.
    """
    answer = os.dup(1)
    os.dup2(2, 1)  # a model may print
    os.nice(19)
    try:
        request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ExplainRequest)
        told: list[Any] = [_answer(request), None]
    except MillpondError as error:
        told = [None, error_to_wire(error)]
    with os.fdopen(answer, "wb") as file:
        file.write(msgspec.msgpack.encode(told))


if __name__ == "__main__":
    _main()
