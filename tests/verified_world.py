"""A cluster in this process whose scores are logged as a replica logs them, and the directory that it leaves."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from check_directory import DEFINITION, LAYOUT, lay_out
from durable_cluster import Crash, DurableCluster, Fault

from millpond.feature_actors.log.record import decode, encode
from millpond.feature_actors.log.schemas import Schemas
from millpond.feature_actors.past import Past
from millpond.feature_actors.plan import FeatureRows
from millpond.feature_actors.ports import complete
from millpond.models.definition import Definition
from millpond.models.model import LoadedModel
from millpond.models.registry import Registry
from millpond.models.score_log import ScoreFiles, Scorer, read_scores, scores_table
from millpond.models.verification import Verification, verify
from millpond.models.version import Version, version_of

MODELS = """
import numpy as np
from millpond.models import Model

class Sums:
    def predict(self, features):
        features.matrix[np.isnan(features.matrix)] = -1.0
        return [{"sum": float(sum(row)), "last": last}
                for row, last in zip(features.matrix, features.texts["by_shop.last"])]

class Product:
    "Rounded otherwise in a batch than alone, as matrix products may be."
    def predict(self, features):
        return np.nan_to_num(features.matrix).sum(axis=1) + 1e-13 * len(features.matrix)

class Looks:
    def predict(self, features, reader):
        more = reader.read([BY_SHOP["n"]], {"shop": ["a"] * len(features.matrix)})
        return more.matrix[:, 0] + features.matrix[:, 0]

both = Model("both", version="1", owner="tests", features=[*BY_USER, *BY_SHOP], predictor=Sums)
user = Model("user", version="1", owner="tests", features=[BY_USER["n"], BY_USER["sum"], BY_USER["max_1h"]],
             predictor=Product)
looks = Model("looks", version="1", owner="tests", features=[BY_USER["n"]], reads=[BY_SHOP["n"]], predictor=Looks)
"""
FILE = Definition("payments.py", DEFINITION + MODELS)
USERS, SHOPS = range(8), ("a", "b", "ü")
MINUTE = 60_000


def payment(number: int, at: int, user: int | None = 1, shop: str | None = "a", cents: int = 1) -> dict[str, Any]:
    return {"id": f"p{number}", "at": at, "user": user, "shop": shop, "cents": cents}


class VerifiedWorld:
    """Send events, score, then `verify`. Scores of one call were read, and predicted, together."""

    def __init__(self, folder: Path, *, n_shards: int = 2, history: bool = False) -> None:
        self.path = folder / "data" / "dev"
        self.cluster = DurableCluster(LAYOUT, n_shards, folder / "live", 16, history=history)
        self.registry = Registry(self.path / "registry")
        self.versions: dict[str, Version] = {}
        self.loaded: dict[str, LoadedModel] = {}
        for model in FILE.declared().models:
            loaded = LoadedModel(model, LAYOUT, folder)
            self.loaded[model.name] = loaded
            self.versions[model.name] = version_of(FILE, model, loaded.plan.key_fields)
        self.registry.add(FILE, list(self.versions.values()))
        self.tables: list[pa.Table] = []

    def send(self, events: Sequence[dict[str, Any]], now_ms: int, fault: Fault | None = None) -> None:
        """Send events; with a fault twice, since the first time fails."""
        if fault is not None:
            self.cluster.fault = fault
            with suppress(Crash):
                self.cluster.send("payments", now_ms, events)
            self.cluster.fault = None
        self.cluster.send("payments", now_ms, events)

    def score(self, name: str, ids: Sequence[dict[str, Any]], as_of_ms: int | None = None) -> list[Any]:
        loaded = self.loaded[name]
        keys = loaded.plan.key_columns(ids, batch=True)
        rows = complete(self.cluster.client.read(loaded.plan, keys, len(ids), as_of_ms))
        return self.log(name, keys, rows)

    def log(self, name: str, keys: dict[str, list[Any]], rows: FeatureRows, role: str = "champion") -> list[Any]:
        loaded, n = self.loaded[name], len(rows.matrix)

        def read(plan: Any, keys: Any, n: int, as_of_ms: int | None) -> FeatureRows:
            return complete(self.cluster.client.read(plan, keys, n, as_of_ms))

        before = FeatureRows(rows.matrix.copy(), rows.as_of, rows.unknown, rows.texts, rows.trace)
        results = loaded.predict(rows, keys, read)
        scorer = Scorer(name, self.versions[name].version, self.versions[name].digest, role)
        first = sum(map(len, self.tables))
        ids = [str(first + i) for i in range(n)]
        self.tables.append(
            scores_table(
                scorer, loaded.plan, self.cluster.shard_map, ids, [self.cluster.clock.ms] * n, keys, before, results
            )
        )
        return results

    def lay_out(self, *, crashed: bool = False) -> Past:
        """Stop the cluster, and write down its scores."""
        lay_out(self.cluster, self.path, crashed=crashed)
        history = self.path / "history"
        for table in self.tables:
            ScoreFiles(str(history), f"w{id(table)}", 1_000).write(table)
        return self.past

    @property
    def past(self) -> Past:
        return Past(self.path, str(self.path / "history"))

    def verify(self, scores: Iterable[pa.Table] | None = None, **options: Any) -> Verification:
        logged = read_scores(str(self.path / "history")) if scores is None else scores
        return verify(self.past, self.registry, logged, **options)

    def change_event(self, event_id: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Change an event in the log of every shard that has it, checksums and all."""
        changed = 0
        for number in range(len(self.cluster.shards)):
            log = self.path / "shards" / f"{number:03d}" / "log"
            schemas = Schemas(log / "schemas")
            with closing(sqlite3.connect(log / "cache.db")) as database, database:
                rows = database.execute("SELECT key, value FROM Cache ORDER BY key").fetchall()
                for offset, value in rows:
                    record, settled = decode(value, offset, schemas.get)
                    events = record.batch.to_pylist() if hasattr(record, "batch") else []
                    if all(event["id"] != event_id for event in events):
                        continue
                    events = [change(event) if event["id"] == event_id else event for event in events]
                    record.batch = pa.RecordBatch.from_pylist(events, schema=record.batch.schema)  # type: ignore[union-attr]
                    content = encode(record, offset, settled, schemas.name_of(record.batch.schema))  # type: ignore[union-attr]
                    database.execute("UPDATE Cache SET value = ? WHERE key = ?", (content, offset))
                    changed += 1
        assert changed


def random_world(
    folder: Path, seed: int, *, n_shards: int = 2, history: bool = False, steps: int = 12
) -> VerifiedWorld:
    """Events late and early, single and in batches, some of them again; crashes, snapshots, parts of the history; and
    scores of all models in between."""
    world, draw = VerifiedWorld(folder, n_shards=n_shards, history=history), random.Random(seed)
    now_ms, number, sent = 1_700_000_000_000, 0, list[dict[str, Any]]()
    for _ in range(steps):
        now_ms += draw.choice([0, 1, 500, MINUTE, 90 * MINUTE])
        events = []
        for _ in range(draw.choice([1, 1, 3, 8])):
            if sent and draw.random() < 0.1:
                events.append(draw.choice(sent))
                continue
            lag = draw.choice([0, 0, 0, 1, 700, MINUTE, 61 * MINUTE, 3 * 60 * MINUTE])
            user = draw.choice([*USERS, 1, 1, None])
            events.append(payment(number, now_ms - lag, user, draw.choice([*SHOPS, None]), draw.randrange(-5, 1_000)))
            number += 1
        sent += events
        what = draw.choice(["", "", "", "crash", "snapshot", "restart"])
        fault = Fault(draw.choice(["before append", "after append", "after commit"])) if what == "crash" else None
        world.send(events, now_ms, fault)
        if what == "restart":
            world.cluster.restart_all()
        if what == "snapshot" and history:
            for shard in range(n_shards):
                world.cluster.write_history(shard)
                world.cluster.snapshot_steps(shard, 1_000)
        as_of_ms = draw.choice([None, None, now_ms + 5, now_ms + 65 * MINUTE])
        some = [
            {"user": draw.choice([*USERS, 99]), "shop": draw.choice([*SHOPS, "?"])} for _ in range(draw.randrange(1, 5))
        ]
        world.score("both", some, as_of_ms)
        world.score("user", [{"user": one["user"]} for one in some[:2]])
        world.score("looks", [{"user": one["user"]} for one in some[:1]])
    return world
