"""Packs: a cluster's events, definitions and models as files; played into another cluster they give what they gave."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apps import NOW, Reply, World, call, make_world
from check_directory import flip
from durable_cluster import DurableCluster
from http_server import Behind, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millpond.cluster.cli import main
from millpond.cluster.packs import export as exporting
from millpond.cluster.packs import replay as replaying
from millpond.cluster.packs.commands import _deploy_line, names_of
from millpond.cluster.packs.export import What, export_pack
from millpond.cluster.packs.masking import Mask
from millpond.cluster.packs.pack import Pack, PackDamaged, checksum_of, sha256_of
from millpond.cluster.packs.replay import Pace, ReplayFailed, replay, speed_of
from millpond.cluster.times import time_of
from millpond.deployments import Ack, Client
from millpond.deployments.score import ScoreApp, ScoreLimits
from millpond.feature_actors.clock import EventClock, ManualClock
from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.past import Past
from millpond.feature_actors.testing import TestCluster
from millpond.models.definition import Definition
from millpond.models.registry import Registry
from millpond.models.version import version_of

HOUR, DAY = 3_600_000, 86_400_000
KEY = b"a key that stays at home"

#: Two sources with a key in common, one without ids of its own; some of it is personal.
TEXT = """
import numpy as np
import pyarrow.compute as pc
from millpond.feature_actors import Count, FeatureView, Field, Last, LastN, Max, Mean, Ratio, SecondsSince, Source, Sum
from millpond.models import Model

orders = Source(
    "orders", owner="checkout", event_id="order_id", event_time="at",
    fields={"order_id": "string", "user_id": Field("int64", optional=True, personal=True),
            "email": Field("string", personal=True), "book": "string", "price": "float64",
            "note": Field("string", optional=True, personal=True), "at": "timestamp[ms, UTC]"})
visits = Source(
    "visits", owner="web", event_time="at",
    fields={"user_id": Field("int64", personal=True), "page": "string", "seconds": "float64",
            "at": "timestamp[ms, UTC]"})
spend = FeatureView(
    "spend", owner="ml", source=orders, key=["user_id"],
    features={"n": Count(window="30d"), "sum": Sum("price", window="30d"), "share": Ratio("sum", "n"),
              "exact": Sum("price", window="1h", exact=True), "books": LastN("book", n=3), "since": SecondsSince(),
              "last_email": Last("email"), "mean": Mean("price", where=pc.field("price") > 1)})
book = FeatureView(
    "book", owner="ml", source=orders, key=["book"],
    features={"n": Count(window="7d"), "sum": Sum("price"), "noted": Count(where=pc.field("note").is_valid())})
time_spent = FeatureView("time_spent", owner="ml", source=visits, key=["user_id"],
                         features={"sum": Sum("seconds", window="1d"), "longest": Max("seconds"), "last": Last("page")})

class Linear:
    def __init__(self, weights=None):
        self.weights = None if weights is None else np.load(weights)
    def predict(self, features):
        weights = 0.1 if self.weights is None else self.weights
        return np.nansum(features.matrix * weights, axis=1)

churn = Model("churn", version="1", owner="ml", predictor=Linear, artifacts={"weights": "weights.npy"},
              features=[spend["n"], spend["sum"], spend["share"], *(time_spent[n] for n in ("sum", "longest"))])
plain = Model("plain", version="1", owner="ml", predictor=Linear, features=[book["n"], book["sum"], spend["mean"]])
"""
TEXT_DEFINITION = Definition("shop.py", TEXT)
DECLARED = TEXT_DEFINITION.declared()
LAYOUT = compile_layout(DECLARED.sources, DECLARED.views)
USERS, BOOKS, PAGES = [1, 2, 3, -7, 10**15], ["a", "b", "ü"], ["home", "cart"]


def order(number: int, at: int, user: Any, book: str, price: float, note: Any = None) -> dict[str, Any]:
    return {"order_id": f"o{number}", "user_id": user, "email": f"user{user}@example.org", "book": book, "price": price,
            "note": note, "at": at}  # fmt: skip


def visit(at: int, user: int, page: str, seconds: float) -> dict[str, Any]:
    return {"user_id": user, "page": page, "seconds": seconds, "at": at}


class Shop:
    """A durable cluster on some shards that has had events, and what it has left on disk."""

    def __init__(self, folder: Path, n_shards: int = 2, history: bool = False) -> None:
        self.folder = folder
        self.cluster = DurableCluster(LAYOUT, n_shards, folder / "live", history=history)
        self.accepted = 0

    def copied(self, folder: Path) -> Shop:
        """The same with a copy of what it has left, for tests that change nothing of the rest."""
        shutil.copytree(self.folder / "dev", folder / "dev")
        copy = Shop.__new__(Shop)
        copy.folder, copy.cluster, copy.accepted = folder, self.cluster, self.accepted
        return copy

    def send(self, name: str, now_ms: int, events: list[dict[str, Any]]) -> None:
        self.accepted += self.cluster.send(name, now_ms, events).accepted

    def fill(self, n: int = 40, begin: int = 0) -> Shop:
        random = np.random.default_rng(5)
        for i in range(begin, begin + n):
            now = NOW + i * HOUR // 2
            late = now - random.choice([0, 0, 0, HOUR // 3, 2 * HOUR, 3 * DAY], size=6)
            users, books = random.choice(np.array([*USERS, 0]), 6).tolist(), random.choice(BOOKS, 6).tolist()
            notes, prices = [None, None, "x", None, None, None], random.normal(size=6).tolist()
            self.send("orders", now, [order(6 * i + k, int(late[k]), users[k] or None, books[k], prices[k], notes[k])
                                      for k in range(6)])  # fmt: skip
            self.send("visits", now, [visit(int(late[k]), users[k] or 5, PAGES[k % 2], float(random.exponential()))
                                      for k in range(3)])  # fmt: skip
        return self

    def left(self) -> Path:
        """The data directory, made if it has not been."""
        directory = self.folder / "dev"
        if directory.exists():
            return directory
        self.cluster.leave(directory)
        with closing(Registry(directory / "registry")) as registry:
            definition = with_weights()
            keys = {"churn": {"user_id": "int64"}, "plain": {"book": "string", "user_id": "int64"}}
            registry.publish(definition, [version_of(definition, m, keys[m.name]) for m in DECLARED.models])
        return directory

    def export(self, what: What, folder: Path | None = None) -> Pack:
        directory = self.left()
        folder = folder or self.folder / "pack"
        history = directory / "history"
        past = Past(directory, str(history) if history.exists() else None)
        with closing(Registry(directory / "registry")) as registry:
            export_pack(past, [TEXT_DEFINITION], registry, folder, what)
        return Pack(folder)


def with_weights() -> Definition:
    sink = pa.BufferOutputStream()
    np.save(sink, np.array([0.5, -1.25, 0.1, 2.0, 1e-3]))
    return Definition("shop.py", TEXT, {"weights.npy": sink.getvalue().to_pybytes()})


ALL = What(allow_personal=True)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("shop")).fill()
    shop.left()
    return shop


@pytest.fixture
def shop(filled: Shop, tmp_path: Path) -> Shop:
    return filled.copied(tmp_path)


def events_of(pack: Pack) -> list[tuple[str, dict[str, Any]]]:
    """All events with their source, in the order of their places."""
    rows = [(name, row) for window in pack.windows() for name, table in window.items() for row in table.to_pylist()]
    return sorted(rows, key=lambda one: one[1]["_place"])


def fields_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("_")}


# -- what is in a pack


@pytest.mark.parametrize("history", [False, True])
def test_a_pack_has_each_event_once_with_its_stamp_in_the_order_of_arrival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: bool
) -> None:
    monkeypatch.setattr(exporting, "WINDOW_EVENTS", 50)
    shop = Shop(tmp_path, 3, history).fill()
    if history:
        for shard in range(3):
            shop.cluster.write_history(shard)
            shop.cluster.snapshot_steps(shard, 1_000)
        shop.fill(2, begin=40)
    pack = shop.export(ALL)
    rows = events_of(pack)
    assert [row["_place"] for _, row in rows] == list(range(shop.accepted))
    arrivals = [row["_arrival_ms"] for _, row in rows]
    assert arrivals == sorted(arrivals)
    for name in LAYOUT.sources:
        mine = [json.dumps(fields_of(row), default=str) for of, row in rows if of == name]
        logged = shop.cluster.logged_events(name)
        assert sorted(mine) == sorted(json.dumps(event, default=str) for event in logged)
        assert pack.manifest.sources[name].events == len(mine)
    assert pack.manifest.events == shop.accepted
    assert len(pack.manifest.windows) == -(-shop.accepted // 50)
    assert (pack.manifest.disputed, pack.manifest.left_out, pack.manifest.cluster) == (0, [], "dev")


def test_its_files_are_their_owners_alone(shop: Shop) -> None:
    pack = shop.export(ALL)
    for path in [pack.folder, *pack.folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert [path.name for path in pack.folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_an_export_with_this_number_of_process_left_or_still_writes_is_left_alone(shop: Shop) -> None:
    """In a container the number is the same each time."""
    other = shop.folder / f".pack.{os.getpid()}"
    other.mkdir()
    (other / "manifest.json").write_text("half of")
    shop.export(ALL)
    assert (other / "manifest.json").read_text() == "half of"


def test_definitions_and_live_models_are_what_up_and_deploy_take(shop: Shop) -> None:
    pack = shop.export(ALL)
    (path,) = pack.manifest.definitions
    assert {(m.model, m.version, m.role, m.definition) for m in pack.manifest.models} == {
        ("churn", "1", "champion", path), ("plain", "1", "champion", path),
    }  # fmt: skip
    assert Definition.read(pack.folder / path).digest == with_weights().digest
    with TestCluster.of_file(pack.folder / path) as c:
        assert c.score("churn", user_id=1).result == 0


def test_another_version_that_is_live_has_a_folder_of_its_own(shop: Shop) -> None:
    directory = shop.left()
    other = Definition(
        "shop.py", TEXT.replace('"plain", version="1"', '"plain", version="2"'), with_weights().artifacts
    )
    (of_two,) = (m for m in other.declared().models if m.name == "plain")
    with closing(Registry(directory / "registry")) as registry:
        version = version_of(other, of_two, {"book": "string", "user_id": "int64"})
        registry.publish(other, [version], "canary", 0.25)
    pack = shop.export(ALL)
    (canary,) = (m for m in pack.manifest.models if m.role == "canary")
    assert (canary.model, canary.version, canary.share) == ("plain", "2", 0.25)
    assert Definition.read(pack.folder / canary.definition).digest == other.digest
    assert canary.definition.startswith("models/")
    assert [path.startswith("definitions/") for path in pack.manifest.definitions] == [True]


def test_features_of_views_that_were_deployed_are_told_and_their_ttls_kept_to(shop: Shop) -> None:
    directory = shop.left()
    view = """
late = FeatureView("late", owner="ml", source=orders, key=["user_id"],
                   features={"email": Last("email", ttl="2h"), "book": Last("book")})
also = Model("also", version="1", owner="ml", predictor=Linear, features=[late["book"]])
"""
    other = Definition("shop.py", TEXT + view, with_weights().artifacts)
    (model,) = (m for m in other.declared().models if m.name == "also")
    with closing(Registry(directory / "registry")) as registry:
        registry.publish(other, [version_of(other, model, {"user_id": "int64"})])
    pack = shop.export(What(mask=("email",), allow_personal=True))
    assert pack.manifest.changed_features == ["late.email", "spend.last_email"]
    assert pack.manifest.ttl_ms_min == 2 * HOUR


def test_a_stretch_of_time_is_chosen_by_arrival(shop: Shop) -> None:
    pack = shop.export(replace(ALL, since_ms=NOW + 5 * HOUR, until_ms=NOW + 7 * HOUR))
    assert {row["_arrival_ms"] for _, row in events_of(pack)} == {NOW + k * HOUR // 2 for k in range(10, 14)}
    assert pack.manifest.events == 4 * 9


def test_a_sample_has_all_events_of_its_entities_and_no_other(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "sample.csv").write_text("user_id\n2\n-7\n2\n404\n")
    pack = shop.export(replace(ALL, entities=tmp_path / "sample.csv"))
    rows = events_of(pack)
    for name in LAYOUT.sources:
        wanted = [e for e in shop.cluster.logged_events(name) if e["user_id"] in (2, -7)]
        assert len(wanted) == sum(of == name for of, _ in rows) > 10
    assert {row["user_id"] for _, row in rows} == {2, -7}
    assert pack.manifest.entities == {"fields": ["user_id"], "size": 3}
    (tmp_path / "two.csv").write_text("book,user_id\nü,2\na,3\n")
    pack = shop.export(replace(ALL, entities=tmp_path / "two.csv"), tmp_path / "two")
    rows = events_of(pack)
    assert {(of, row["book"], row["user_id"]) for of, row in rows} == {("orders", "ü", 2), ("orders", "a", 3)}
    assert pack.manifest.left_out == ["visits"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user_id\nx\n", "cannot be read: In CSV column #0: CSV conversion error to int64: invalid value 'x'"),
        ("user\n1\n", "column `user` is no field that can be in a key; known: .*did you mean `user_id`"),
        ("price\n1\n", "column `price` is no field that can be in a key"),
        ("user_id,user_id\n1,2\n", "column `user_id` comes twice"),
        ("user_id\n", "names no entity"),
        ("book,page\na,b\n", r"has the columns \['book', 'page'\]; no source has all of these fields"),
        ("", "cannot be read: Empty CSV file"),
    ],
)
def test_a_sample_that_does_not_fit_is_told(shop: Shop, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "sample.csv").write_text(content)
    with pytest.raises(BadRequest, match=f"^entities: `.*sample.csv`:? {message}"):
        shop.export(replace(ALL, entities=tmp_path / "sample.csv"))
    assert not (tmp_path / "pack").exists()


# -- what may leave


def test_masks_are_the_same_in_every_source_and_nothing_of_the_values_is_left(shop: Shop) -> None:
    pack = shop.export(What(mask=("user_id", "email"), drop=("note",), mask_key=KEY))
    mask = Mask(KEY)
    users = {user: mask.column(pa.array([user])).to_pylist()[0] for user in [*USERS, 5]}
    for name in LAYOUT.sources:
        logged = {json.dumps(e, default=str) for e in shop.cluster.logged_events(name)}
        back = {masked: user for user, masked in users.items()}
        for of, row in events_of(pack):
            if of == name:
                event = fields_of(row)
                event["user_id"] = back.get(event["user_id"])
                if name == "orders":
                    assert event["email"] == mask.text(f"user{event['user_id']}@example.org")
                    event["email"] = f"user{event['user_id']}@example.org"
                    assert event["note"] is None
                    event["note"] = "x" if int(event["order_id"][1:]) % 6 == 2 else None
                assert json.dumps(event, default=str) in logged
    content = b"".join(path.read_bytes() for path in pack.folder.rglob("*.parquet"))
    for table in (table for window in pack.windows() for table in window.values()):
        content += "\n".join(map(str, table.to_pylist())).encode()
    assert b"example.org" not in content
    assert KEY not in b"".join(path.read_bytes() for path in pack.folder.rglob("*") if path.is_file())
    assert pack.manifest.masked == ["email", "user_id"]
    assert pack.manifest.changed_features == ["book.noted", "spend.last_email"]


def test_without_a_key_masks_are_others_each_time(shop: Shop, tmp_path: Path) -> None:
    what = What(mask=("user_id", "email", "note"))
    packs = [shop.export(what, tmp_path / name) for name in ("one", "two")]
    ids = [[row["user_id"] for _, row in events_of(pack) if row["user_id"] is not None] for pack in packs]
    assert len(set(ids[0])) == len(set(ids[1])) == 6
    assert not set(ids[0]) & set(ids[1])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (What(), "export: `orders.email`, `orders.note`, `orders.user_id`, `visits.user_id` are personal; mask them"),
        (What(mask=("user_id",), drop=("note",)), "export: `orders.email` are personal; mask them"),
        (What(mask=("users_id",)), "export: no source has a field `users_id`; .*did you mean `user_id`"),
        (What(mask=("price",)), "export: field `price` of `orders` is `double`; masks are of integers and strings"),
        (What(mask=("at",)), "export: field `at` of `.*` is `timestamp"),
        (What(drop=("email",)), "export: field `email` of `orders` can be neither null nor a default, so it cannot be"),
        (What(drop=("at",)), "export: field `at` of `orders` can be neither null nor"),
        (replace(ALL, mask=("note",), drop=("note",)), "export: field `note` is to be masked and to be dropped"),
        (replace(ALL, since_ms=NOW, until_ms=NOW), "export: `since` is not before `until`"),
    ],
)
def test_what_may_not_leave_is_named_and_nothing_is_written(shop: Shop, what: What, message: str) -> None:
    with pytest.raises(BadRequest, match=f"^{message}"):
        shop.export(what)
    assert [path.name for path in shop.folder.iterdir()] == ["dev"]


def test_a_field_of_two_types_has_no_mask() -> None:
    text = TEXT.replace(
        'fields={"user_id": Field("int64", personal=True)', 'fields={"user_id": Field("int32", personal=True)'
    )
    declared = Definition("two.py", text).declared()
    with pytest.raises(BadRequest, match="field `user_id` is `int64` in `orders` and `int32` in `visits`: their masks"):
        exporting._check_fields(declared.sources, What(mask=("user_id",), allow_personal=True))


def test_a_folder_that_is_there_is_left_alone(shop: Shop) -> None:
    pack = shop.export(ALL)
    before = pack.manifest.id
    with pytest.raises(BadRequest, match=r"export: `.*pack` is there already; name a folder that is not"):
        shop.export(ALL)
    assert Pack(pack.folder).manifest.id == before


# -- damage


@given(data=st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pack_of_which_a_byte_has_changed_is_refused_by_the_name_of_its_file(
    packed: Pack, data: st.DataObject
) -> None:
    files = sorted(path for path in packed.folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    at, bit = data.draw(st.integers(0, path.stat().st_size - 1)), 1 << data.draw(st.integers(0, 7))
    flip(path, at, bit)
    try:
        with pytest.raises(PackDamaged, match=rf"^pack: `{path}` "):
            Pack(packed.folder)
    finally:
        flip(path, at, bit)
    Pack(packed.folder)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return Shop(tmp_path_factory.mktemp("packed")).fill(5).export(ALL)


def test_a_pack_that_is_not_whole_is_refused_by_name(shop: Shop, tmp_path: Path) -> None:
    pack = shop.export(ALL)
    manifest = pack.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    aside = tmp_path / "aside"
    for path in sorted(path for path in pack.folder.rglob("*") if path.is_file()):
        path.rename(aside)
        with pytest.raises(PackDamaged, match=rf"^pack: `{path}` cannot be read: No such file"):
            Pack(pack.folder)
        aside.rename(path)
    for change, message in (
        ({"format": 2}, "has format 2; this version reads 1; use the version that wrote it"),
        (
            {"files": {**content["files"], "../dev/manifest.json": [1, ""]}},
            "names `../dev/manifest.json`, which does not",
        ),
        ({"files": {}}, "names `events/orders.parquet`, of which it has no checksum"),
    ):
        changed = {k: v for k, v in {**content, **change}.items() if k != "checksum"}
        manifest.write_text(json.dumps({**changed, "checksum": checksum_of(changed)}))
        with pytest.raises(PackDamaged, match=message):
            Pack(pack.folder)
    manifest.write_text("[" * 100_000)
    with pytest.raises(PackDamaged, match="cannot be read: maximum recursion depth"):
        Pack(pack.folder)
    manifest.write_text("[]")
    with pytest.raises(PackDamaged, match="cannot be read: it is none of a pack"):
        Pack(pack.folder)


def _rewritten(change: Callable[[pa.Table], pa.Table], row_group_size: int | None = None) -> Callable[[Path], None]:
    def of(path: Path) -> None:
        pq.write_table(change(pq.read_table(path)), path, row_group_size=row_group_size)

    return of


def _with(name: str, column: Callable[[pa.ChunkedArray], Any]) -> Callable[[Path], None]:
    return _rewritten(lambda t: t.set_column(t.column_names.index(name), name, column(t[name])))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"PAR1 something PAR1"),
        lambda path: [flip(path, at, 255) for at in range(60, 80)],
        _rewritten(lambda t: t.drop_columns(["_place"])),
        _rewritten(lambda t: t.drop_columns(["_arrival_ms"])),
        _with("_arrival_ms", lambda c: c.cast(pa.string())),
        _with("_place", lambda c: pa.nulls(len(c), pa.int64())),
        _rewritten(lambda t: t, row_group_size=10),
        _rewritten(lambda t: t.slice(0, 3)),
        _rewritten(lambda t: pa.concat_tables([t] * 3_000)),
    ],
)
def test_events_that_are_none_are_refused_though_their_checksum_is_right(
    packed: Pack, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """Whoever can change a file can change its checksum."""
    folder = tmp_path / "pack"
    shutil.copytree(packed.folder, folder)
    change(folder / "events" / "orders.parquet")
    with pytest.raises(PackDamaged, match="do not use it"):
        list(_resealed(folder).windows())


@pytest.mark.parametrize("windows", [[0, 45], [], [45, 90], [-1, 45]])
def test_windows_that_are_not_those_of_the_files_are_refused(packed: Pack, tmp_path: Path, windows: list[int]) -> None:
    folder = tmp_path / "pack"
    shutil.copytree(packed.folder, folder)
    pack = _resealed(folder, windows=windows)
    with pytest.raises(PackDamaged, match="are no row group of each source; do not use it"):
        list(pack.windows())


def _resealed(folder: Path, **change: Any) -> Pack:
    """Open a pack whose manifest is right for the files that are there."""
    manifest = folder / "manifest.json"
    content = {k: v for k, v in {**json.loads(manifest.read_text()), **change}.items() if k != "checksum"}
    content["files"] = {name: [(folder / name).stat().st_size, sha256_of(folder / name)] for name in content["files"]}
    manifest.write_text(json.dumps({**content, "checksum": checksum_of(content)}))
    return Pack(folder)


# -- replay


@pytest.fixture
def staging() -> Iterator[tuple[World, str]]:
    yield from served(3)


def served(shards: int, **options: Any) -> Iterator[tuple[World, str]]:
    models = [replace(m, artifacts={}) for m in DECLARED.models]
    world = make_world(models, n_shards=shards, layout=LAYOUT, clock=options.pop("clock", EventClock()))
    behind = Behind(world, **options)
    with serve(behind) as url:
        yield world, url


def played(pack: Pack, url: str, speed: float | None = None, **options: Any) -> Ack:
    with Client(url, retry_s=5) as client:
        return replay(pack, client, Pace(speed, sleep=lambda s: None), **options)


def answers(ask: Callable[[str, Any], Reply], users: list[int]) -> list[Any]:
    """All features and scores of a sample, as of one time; ids and the users themselves left out."""
    ids = [{"user_id": user} for user in users]
    both = [{"user_id": user, "book": book} for user in users for book in BOOKS]
    found: list[Any] = []
    for name, body in (("churn", ids), ("plain", both)):
        found += [{k: v for k, v in one.items() if k != "id"} for one in ask(name, body).json]
    return found


def source_answers(shop: Shop, as_of: int) -> list[Any]:
    """What the cluster that the pack is of answers."""
    from concurrent.futures import ThreadPoolExecutor

    from millpond.deployments.lane import Lane
    from millpond.deployments.served import Models, Served
    from millpond.models.model import LoadedModel

    async def no_status() -> list[dict[str, Any]]:
        return []

    client = shop.cluster.client
    loaded = [LoadedModel(replace(m, artifacts={}), LAYOUT, Path()) for m in DECLARED.models]
    served = {one.model.name: Served(one.model.name, Lane(one, client, ThreadPoolExecutor(1))) for one in loaded}
    app = ScoreApp(client, Models(served), no_status, ScoreLimits(), "", "dev")
    path = "/v1/score/{}?features=true&as_of={}"
    return answers(lambda name, body: call(app, "POST", path.format(name, as_of), body), USERS)


def target_answers(world: World, as_of: int, users: list[int] = USERS) -> list[Any]:
    return answers(lambda name, body: world.post_score(f"{name}?features=true&as_of={as_of}", body), users)


AS_OF = NOW + 30 * HOUR


def test_every_feature_and_score_is_found_again_on_another_number_of_shards(
    shop: Shop, staging: tuple[World, str]
) -> None:
    world, url = staging
    ack = played(shop.export(ALL), url)
    assert (ack.accepted, ack.duplicates, ack.conflicts) == (shop.accepted, 0, 0)
    assert ack.late > 0
    assert target_answers(world, AS_OF) == source_answers(shop, AS_OF)


def test_behind_masks_every_feature_that_reads_none_is_found_again(shop: Shop, staging: tuple[World, str]) -> None:
    world, url = staging
    pack = shop.export(What(mask=("user_id", "email"), drop=("note",), mask_key=KEY))
    played(pack, url)
    masked = Mask(KEY).column(pa.array(USERS)).to_pylist()
    assert target_answers(world, AS_OF, masked) == source_answers(shop, AS_OF)
    query = f"/v1/features/spend?user_id={masked[0]}&as_of={AS_OF}"
    assert world.get(query).json["features"]["last_email"] == Mask(KEY).text("user1@example.org")


def test_a_replay_that_was_broken_off_goes_on_and_counts_nothing_twice(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at another speed, and in other requests: what has no ids is known by its row."""
    pack = shop.export(ALL)
    for faults, speed in ((["ok"] * 20 + [(500, None)], None), (["ok"] * 3 + [(500, None)], 1e9), (["torn"], 50.0)):
        for world, url in served(3, faults=list(faults)):
            monkeypatch.setattr(replaying, "_REQUEST_EVENTS", 12)
            accepted = 0
            if "torn" not in faults:  # a torn answer is tried again by the client
                with pytest.raises(
                    ReplayFailed, match=r"of 360 events \d+ have been sent, then: .*run it again to go on"
                ):
                    played(pack, url, speed)
                accepted = world.applied
                assert accepted > 0
            for again, events_max in ((None, 10_000), (200.0, 7), (None, 5)):
                monkeypatch.setattr(replaying, "_REQUEST_EVENTS", events_max)
                ack = played(pack, url, again)
                assert ack.accepted + ack.duplicates == 360
            assert ack.duplicates == 360
            assert target_answers(world, AS_OF) == source_answers(shop, AS_OF)


def test_as_of_event_each_event_arrives_when_it_happened(shop: Shop, staging: tuple[World, str]) -> None:
    _, url = staging
    ack = played(shop.export(ALL), url, arrival="event")
    assert (ack.accepted, ack.late, ack.too_late) == (shop.accepted, 0, 0)


def test_a_cluster_whose_clock_is_the_walls_takes_a_replay_with_its_token(shop: Shop) -> None:
    pack = shop.export(ALL)
    for world, url in served(2, clock=ManualClock(NOW + DAY)):
        with pytest.raises(ReplayFailed, match="needs the admin token"):
            played(pack, url)
        with Client(url, admin_token="the-admin-token") as client:
            assert replay(pack, client, Pace(None)).accepted == shop.accepted
        assert target_answers(world, NOW + DAY) == source_answers(shop, NOW + DAY)


def test_ids_that_the_cluster_has_had_with_other_content_fail_the_count(shop: Shop, staging: tuple[World, str]) -> None:
    world, url = staging
    at = NOW - 30 * DAY
    assert world.post_events("orders", [order(1, at, 1, "a", 5.0), order(2, at, 1, "a", 5.0)]).status == 200
    with pytest.raises(
        ReplayFailed, match=r"the pack has 360 events; the cluster has accepted 358, 0 were there already, 2"
    ):
        played(shop.export(ALL), url)


def test_a_replay_takes_as_long_as_its_speed_says_and_sends_nothing_before_it_is_due(
    shop: Shop, staging: tuple[World, str]
) -> None:
    _, url = staging
    now, sent = [100.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    pack = shop.export(ALL)
    first = events_of(pack)[0][1]["_arrival_ms"]
    with Client(url) as client:
        pace = Pace(1_000.0, lambda: now[0], sleep)
        replay(pack, client, pace, progress=lambda n: sent.append((now[0], n)))
    span_s = (events_of(pack)[-1][1]["_arrival_ms"] - first) / 1_000
    assert now[0] - 100 == pytest.approx(span_s / 1_000)
    arrivals = sorted(row["_arrival_ms"] for _, row in events_of(pack))
    assert all(arrivals[n - 1] <= first + (at - 100) * 1e6 + 1 for at, n in sent)
    assert sent[-1][1] == 360


def test_requests_keep_to_their_sizes(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "_REQUEST_EVENTS", 7)
    pack = shop.export(ALL)
    requests = list(replaying._requests(pack, None))
    assert max(len(request.events) for request in requests) == 7
    for name in LAYOUT.sources:
        places = [p for r in requests if r.source == name for p in r.events["_place"].to_pylist()]
        assert places == sorted(places) == [row["_place"] for of, row in events_of(pack) if of == name]


def test_at_full_speed_sources_without_ids_take_no_more_requests_than_others(shop: Shop) -> None:
    requests = list(replaying._requests(shop.export(ALL), None))
    assert sorted((r.source, r.row, len(r.events)) for r in requests) == [("orders", 0, 240), ("visits", 0, 120)]


@pytest.mark.parametrize("text", ["0x", "-1x", "fast", "nanx", "infx", ""])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="--speed: got"):
        speed_of(text)


# -- the commands


@pytest.fixture
def stopped(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    shop.left()
    (shop.folder / "shop.py").write_text(TEXT)
    monkeypatch.chdir(shop.folder)
    return shop


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    status = main([*arguments, "--data-dir", ".", "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


def test_a_pack_is_exported_and_replayed_from_the_command_line(
    stopped: Shop, staging: tuple[World, str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, url = staging
    status, exported, _ = told(
        capsys, "export", "shop.py", "-o", "pack", "--mask", "user_id,email", "--mask", "note",
        "--mask-key-file", "key", "--since", "2023-11-14", "--until", str(NOW + 10 * HOUR),
    )  # fmt: skip
    assert (status, exported["events"], exported["sources"]) == (0, 180, {"orders": 120, "visits": 60})
    assert exported["models"] == ["churn@1 (champion)", "plain@1 (champion)"]
    assert exported["masked"] == ["email", "note", "user_id"]
    assert main(["replay", "pack", "--to", url, "--data-dir", "."]) == 0
    out, err = capsys.readouterr()
    assert f"to                {url}\n" in out
    assert "accepted          180\n" in out
    (line,) = (line for line in err.splitlines() if "--model churn" in line)
    assert line.strip().startswith("millpond deploy pack/definitions/")
    status, replayed, _ = told(capsys, "replay", "pack", "--to", url, "--speed", "100000000x")
    assert (status, replayed["accepted"], replayed["duplicates"]) == (0, 0, 180)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "-o", "pack"], "export: no cluster `dev` runs on .*; name its definition files, or start it"),
        (["export", "shop.py", "-o", "pack"], "export: `orders.email`, .* are personal"),
        (["export", "shop.py", "-o", "pack", "--since", "soon"], "--since: got 'soon'; a time is ISO 8601, or"),
        (["export", "shop.py", "-o", "pack", "--mask-key-file", "pack/key", "--allow-personal"],
         "--mask-key-file: `pack/key` lies in the pack; keep the key out of it"),
        (["replay", "pack"], "pack: `pack/manifest.json` cannot be read: No such file or directory"),
        (["replay", "pack", "--speed", "no"], "--speed: got 'no'"),
        (["replay", "pack", "--to", "ftp://a"], "--to: got 'ftp://a'; allowed is http://HOST:PORT"),
        (["export", "shop.py", "-o", "pack", "--since", "9" * 20], "--since: got '9+'; a time is ISO 8601, or"),
    ],
)  # fmt: skip
def test_a_command_that_cannot_be_done_says_why(
    stopped: Shop, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = told(capsys, *arguments)
    assert (status, out) == (1, None)
    assert re.match(f"millpond: {message}", err), err
    assert not (stopped.folder / "pack").exists()


def test_where_nothing_runs_a_replay_asks_for_a_url(stopped: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    stopped.export(ALL)
    status, _, err = told(capsys, "replay", "pack")
    assert (status, err.startswith("millpond: replay: no cluster `dev` runs on")) == (1, True)


def test_a_file_of_a_token_that_is_not_there_is_named(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(shop.export(ALL).folder.parent)
    status, _, err = told(capsys, "replay", "pack", "--to", "http://127.0.0.1:9", "--token-file", "none")
    assert (status, "--token-file: `none` cannot be read: No such file" in err) == (1, True)


def test_times_and_names_of_options() -> None:
    assert time_of("--since", None) is None
    assert time_of("--since", "2024-01-01T01:00:00+01:00") == time_of("--since", "2024-01-01") == 1_704_067_200_000
    assert names_of(["a,b", " c ", ""]) == ("a", "b", "c")


def test_a_line_to_paste_is_one_command_whatever_the_folder_is_called(shop: Shop, tmp_path: Path) -> None:
    pack = shop.export(ALL, tmp_path / "of [bold] '; echo")
    for model in pack.manifest.models:
        words = shlex.split(_deploy_line(pack, model))
        assert words == ["millpond", "deploy", str(pack.folder / model.definition), "--model", model.model, "--as",
                         "champion"]  # fmt: skip
