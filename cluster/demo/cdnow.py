"""The purchases of CDNOW, an online shop for music, as a source of events and as churn labels.

The cohort: all 23,570 customers who bought first in January to March 1997, and all 69,659 purchases of
theirs until 1998-06-30. The data knows the day of a purchase only, so each stands at midnight UTC of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millpond.cluster.demo.datasets import LIFETIMES, fetch
from millpond.feature_actors.errors import BadRequest

__all__ = ["CHURN_LABELS", "PURCHASES", "churn_labels", "load_purchases"]

_TIME = pa.timestamp("ms", tz="UTC")

#: cds: how many. amount: US dollars, 0 for 80 purchases.
PURCHASES = pa.schema(
    [
        pa.field("purchase_id", pa.string(), nullable=False),
        pa.field("customer_id", pa.int64(), nullable=False),
        pa.field("cds", pa.float64(), nullable=False),
        pa.field("amount", pa.float64(), nullable=False),
        pa.field("bought_at", _TIME, nullable=False),
    ]
)

CHURN_LABELS = pa.schema(
    [
        pa.field("customer_id", pa.int64(), nullable=False),
        pa.field("as_of", _TIME, nullable=False),
        pa.field("churned", pa.bool_(), nullable=False),
    ]
)


def load_purchases() -> pa.Table:
    """Fetch and read the 69,659 purchases, ordered by day; ties are in the order of the file.

    `purchase_id` is customer, day and the how-manieth purchase of that day: `4-1997-01-18-1`.
    Raises `DatasetError` if the data cannot be fetched.
    """
    path = fetch(LIFETIMES) / "lifetimes" / "datasets" / "CDNOW_master.txt"
    row = np.dtype([("customer_id", np.int64), ("date", np.int64), ("cds", np.float64), ("amount", np.float64)])
    rows = np.loadtxt(path, dtype=row, skiprows=1)
    rows = rows[np.argsort(rows["date"], kind="stable")]
    customer, day = rows["customer_id"], _days(rows["date"])
    parts = zip(customer.tolist(), day.astype(str).tolist(), _nth_of_day(customer, day).tolist(), strict=True)
    return pa.table(
        {
            "purchase_id": ["-".join(map(str, part)) for part in parts],
            "customer_id": customer,
            "cds": rows["cds"],
            "amount": rows["amount"],
            "bought_at": pa.array(day.astype("datetime64[ms]")).cast(_TIME),
        },
        schema=PURCHASES,
    )


def churn_labels(purchases: pa.Table, as_of: str | np.datetime64, horizon_days: int = 90) -> pa.Table:
    """Return, for each customer who bought before the day `as_of`, whether the customer is lost.

    as_of: a date, `"1997-10-01"`. churned: no purchase in `[as_of, as_of + horizon_days)`.

    The column `as_of` is the last millisecond before that day: a read includes its own instant, and all
    purchases of a day stand at its midnight, where they must count for the label only. Rows are in the
    order of `customer_id`.

    Raises `BadRequest` if the purchases end before the horizon does: a customer is not lost because
    the data is.
    """
    start = np.datetime64(as_of).astype("datetime64[D]")
    end = start + horizon_days
    day = purchases["bought_at"].to_numpy().astype("datetime64[D]")
    if len(day) == 0 or end > day.max() + 1:
        known = f"up to {day.max()}" if len(day) else "none"
        raise BadRequest(
            f"churn labels as of {start}: a horizon of {horizon_days} days needs purchases up to {end - 1}, "
            f"got {known}; choose an earlier `as_of` or a shorter horizon"
        )
    customer = purchases["customer_id"].to_numpy()
    known_customers = np.unique(customer[day < start])
    returned = np.unique(customer[(day >= start) & (day < end)])
    instant = np.full(len(known_customers), start.astype("datetime64[ms]") - 1)
    return pa.table(
        {
            "customer_id": known_customers,
            "as_of": pa.array(instant).cast(_TIME),
            "churned": ~np.isin(known_customers, returned),
        },
        schema=CHURN_LABELS,
    )


def _days(yyyymmdd: npt.NDArray[np.int64]) -> npt.NDArray[np.datetime64]:
    """Return 19970118 as the date 1997-01-18."""
    month = ((yyyymmdd // 10000 - 1970) * 12 + yyyymmdd // 100 % 100 - 1).astype("datetime64[M]")
    days_later = (yyyymmdd % 100 - 1).astype("timedelta64[D]")
    day: npt.NDArray[np.datetime64] = month.astype("datetime64[D]") + days_later
    return day


def _nth_of_day(customer: npt.NDArray[np.int64], day: npt.NDArray[np.datetime64]) -> npt.NDArray[np.int64]:
    """Count the purchases of one customer on one day in their order, from 1."""
    order = np.lexsort((day, customer))  # stable
    c, d = customer[order], day[order]
    starts = np.flatnonzero(np.r_[True, (c[1:] != c[:-1]) | (d[1:] != d[:-1])])
    nth = np.empty(len(order), np.int64)
    nth[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)])) + 1
    return nth
