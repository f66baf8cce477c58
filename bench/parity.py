"""`millpond bench parity`: what was served while events came in is computed again from the past.

1. Start a cluster of its own with two shards and views of two keys, which logs every score; load events of few users
   and items, so that scores and events meet at the same entities.
2. Score two models, one of them over both shards, while bodies of events are posted; of the events some are late, and
   some are sent again.
3. Verify every logged score from the history and the logs, as `millpond verify` does.
4. Play a pack of it into a staging cluster of three shards, which has to give the same live scores of everybody, and
   find every logged score again in what that has left.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from millpond.bench import accounts, reference, staging
from millpond.bench.events import json_bodies
from millpond.bench.load import Load
from millpond.bench.mixed import event_table
from millpond.bench.options import Options
from millpond.bench.poster import Poster
from millpond.bench.testbed import SETTING_MEANINGS, Testbed, id_bodies
from millpond.bench.workload import Evidence, Steps
from millpond.cluster.config import Config
from millpond.cluster.packs.export import What, export_pack
from millpond.cluster.packs.pack import Pack
from millpond.cluster.packs.replay import Pace, replay
from millpond.cluster.status import fetch_status
from millpond.cluster.verify import past_of, verify_cluster
from millpond.deployments import Client
from millpond.feature_actors.errors import Unavailable
from millpond.feature_actors.layout import compile_layout
from millpond.models.score_log import read_scores
from millpond.models.verification import Verification

__all__ = ["ParityWorkload", "make"]

_USERS, _ITEMS = 200, 20
#: Bodies a second, events of a body; of these so many are late, up to a day, and so many are sent again.
_POSTS_PER_S, _POST_EVENTS = 20.0, 500
_LATE, _AGAIN = 0.05, 0.01
_DAY_MS = 86_400_000
_LOGGED_S_MAX = 60.0
#: Scores that are told of when they are not found again.
_SHOWN_MAX = 6
_DEFINITIONS = [Path(accounts.__file__), Path(reference.__file__)]

MEANINGS = {
    "compared": "logged scores that were computed again",
    "different": "of them, in a feature or in the result",
    "missing": "logged scores that could not be",
    "within_request": "read between two events of one request, and equal",
    "verified_scores_per_s": "in one process",
    "staging_compared": "logged scores that were looked for in a staging cluster of three shards, fed by a pack",
    "staging_different": "of them, in a feature",
    "acked_events": "",
    "late_events": "of them",
    "duplicates": "events sent again, which are not counted again",
    "failed_requests": "of scores and of bodies of events",
    **{name: meaning for name, meaning in SETTING_MEANINGS.items() if name not in ("rounds", "ids")},
}


class ParityWorkload:
    """Scores and events together, then a verification."""

    name = "parity"
    meanings: Mapping[str, str] = MEANINGS

    def __init__(self, config: Config, options: Options) -> None:
        self._options, self.seed = options, options.seed or 0
        logged = {"score_log_share": 1.0, "score_log_flush_s": 0.5, "score_log_waiting_max": 10_000_000}
        self._bed = Testbed(config, _DEFINITIONS, shards=2, **logged)
        self._staging = Testbed(config, _DEFINITIONS, shards=3, clock="event", score_log_share=0.0)
        self._poster: Poster | None = None
        self._found: Verification | None = None
        self._seconds = 0.0
        self._staging_compared, self._staging_different = 0, list[str]()
        self._disputed = 0
        self._kept: Path | None = None

    def setup(self, steps: Steps) -> None:
        self._bed.start(steps)

    def start(self, steps: Steps) -> None:
        bed = self._bed
        self._poster = Poster(
            bed.url, f"/v1/events/{reference.activity.name}", self._bodies(), content_type="application/json",
            per_s=_POSTS_PER_S,
        )  # fmt: skip
        draw = np.random.default_rng(self.seed)
        users = id_bodies(draw.integers(0, _USERS, 10_000))
        drawn = draw.integers(0, (_USERS, _ITEMS), (10_000, 2)).tolist()
        pairs = [b'{"user_id":%d,"item_id":"item-%d"}' % (user, item) for user, item in drawn]
        with steps.step("scores and events"):
            self._poster.start()
            try:
                with bed.running(self._load("reference", users), "reference"):
                    bed.run(self._load("pair_account", pairs), "pair_account")
            finally:
                self._poster.stop()
        with steps.step("verify") as advance:
            self._wait_until_logged()
            begun = time.perf_counter()
            self._found = verify_cluster(bed.config)
            self._seconds = time.perf_counter() - begun
            advance(1, f"{self._found.scores.equal:,} scores")
        with steps.step("export a pack") as advance:
            self._wait_until_logged()
            with Client(bed.url) as client:
                lived = [client.score(model, ids, features=True) for model, ids in _everybody()]
            production, definitions = past_of(bed.config), bed.definitions
            exported = export_pack(production, definitions, None, bed.folder / "pack", What(allow_personal=True))
            self._disputed = exported.disputed
            advance(1, f"{exported.events:,} events, {exported.disputed:,} of disputed order")
            bed.stop()
        self._staging.start(steps)
        with steps.step("replay into staging") as advance:
            with Client(self._staging.url, retry_s=_LOGGED_S_MAX) as client:
                replay(Pack(bed.folder / "pack"), client, Pace(None))
                for (model, ids), were in zip(_everybody(), lived, strict=True):
                    again = client.score(model, ids, features=True, as_of=were[0].as_of)
                    if unlike := [
                        one for one, other in zip(were, again, strict=True) if one != replace(other, id=one.id)
                    ]:
                        bed.wrong.append(
                            f"staging gives the scores of production: {len(unlike)} are others, {unlike[:3]}"
                        )
            advance(1, f"{sum(map(len, lived)):,} live scores")
            self._staging.stop()
        with steps.step("find scores again") as advance:
            assert production.history_uri is not None
            declared = [definition.declared() for definition in definitions]
            pasts = production, past_of(self._staging.config)
            layout = compile_layout([], [v for d in declared for v in d.views])
            models = {m.name: m for d in declared for m in d.models}
            self._staging_compared, self._staging_different = staging.found_again(
                *pasts, layout, models, read_scores(production.history_uri)
            )
            advance(1, f"{self._staging_compared:,} scores")
        if self._staging_different:
            some = self._staging_different[:: -(-len(self._staging_different) // _SHOWN_MAX)]
            for line in staging.differences(*pasts, layout, models, read_scores(production.history_uri), some):
                steps.console.print(line, highlight=False, soft_wrap=True, markup=False)
            self._kept = Path(tempfile.mkdtemp(prefix="millpond-parity-"))
            bed.keep(self._kept / "production")
            self._staging.keep(self._kept / "staging")

    def _load(self, model: str, bodies: list[bytes]) -> Load:
        return self._bed.load(
            f"/v1/score/{model}", bodies, connections=8, texts=[(b'"model"', 1)],
            seconds=2 * self._options.measured_seconds, seed=self.seed,
        )  # fmt: skip

    def _bodies(self) -> Iterator[bytes]:
        """Yield bodies of events of now, of which some are late, and some have been sent before."""
        draw, before = np.random.default_rng(self.seed), None
        for body in itertools.count():
            now_ms = int(time.time() * 1000)
            late = np.where(draw.random(_POST_EVENTS) < _LATE, draw.integers(3_600_001, _DAY_MS, _POST_EVENTS), 1)
            table = event_table(
                draw, [f"parity-{body}-{n}" for n in range(_POST_EVENTS)], _USERS, _ITEMS, now_ms - late
            )
            if before is not None:
                n = round(_POST_EVENTS * _AGAIN)
                columns = [[*before[name].to_pylist()[:n], *table[name].to_pylist()[n:]] for name in table.column_names]
                table = type(table).from_arrays(columns, schema=table.schema)
            before = table
            yield json_bodies(table, _POST_EVENTS)[0]

    def _wait_until_logged(self) -> None:
        cluster, deadline = self._bed.cluster, time.monotonic() + _LOGGED_S_MAX
        assert cluster is not None
        state = {"url": self._bed.url}
        before: Any = None
        while time.monotonic() < deadline:
            counts = fetch_status(state, self._bed.config.directory)["score_log"]
            if counts["waiting"] == 0 and counts == before:
                return
            before = counts
            time.sleep(1.5)  # replicas report each second
        raise Unavailable(f"scores still wait to be logged after {_LOGGED_S_MAX:g} s: {before}")

    def check(self, steps: Steps) -> list[str]:
        assert self._found is not None
        assert self._poster is not None
        wrong = list(self._bed.wrong)
        if self._poster.failed:
            wrong.append(f"every body of events is acknowledged: {self._poster.failed} were not")
        if not (self._poster.counts.get("late") and self._poster.counts.get("duplicates")):
            wrong.append(f"some events are late, and some are sent again: got {self._poster.counts}")
        if self._found.scores.missing or not self._found.scores.equal:
            wrong.append(f"every logged score can be computed again: got {self._found.scores}")
        wrong += [f"a score is equal when it is computed again: {one}" for one in self._found.differences]
        if self._staging_different or not self._staging_compared:
            wrong.append(
                f"every logged score is found again in staging: of {self._staging_compared} these are not: "
                f"{self._staging_different[:10]} (events of disputed order: {self._disputed}; all is kept in "
                f"`{self._kept}`)"
            )
        return wrong

    def metrics(self) -> dict[str, Any]:
        assert self._found is not None
        assert self._poster is not None
        scores = self._found.scores
        figures = {
            "compared": scores.equal + scores.different,
            "different": scores.different,
            "missing": scores.missing,
            "within_request": self._found.within_request,
            "verified_scores_per_s": round(scores.equal / self._seconds),
            "staging_compared": self._staging_compared,
            "staging_different": len(self._staging_different),
            "acked_events": self._poster.accepted,
            "late_events": self._poster.counts.get("late", 0),
            "duplicates": self._poster.counts.get("duplicates", 0),
            "failed_requests": self._bed.failed + self._poster.failed,
            "measured_seconds": 2 * self._options.measured_seconds,
            **self._bed.settings,
        }
        return {name: figures[name] for name in MEANINGS if name in figures}

    @property
    def evidence(self) -> Evidence:
        return self._bed.evidence()

    def close(self) -> None:
        if self._poster is not None:
            self._poster.stop()
        try:
            self._staging.close()
        finally:
            self._bed.close()


def _everybody() -> list[tuple[str, list[dict[str, Any]]]]:
    """Return models, and for each all ids that there are."""
    pairs = [{"user_id": user, "item_id": f"item-{item}"} for user in range(_USERS) for item in range(_ITEMS)]
    return [("pair_account", pairs), ("reference", [{"user_id": user} for user in range(_USERS)])]


def make(config: Config, options: Options) -> ParityWorkload:
    return ParityWorkload(config, options)
