"""A stream of card payments that is made up, with frauds put in and labelled: what `millpond demo fraud` runs on.

Nothing here is real; what a model finds in it says how features tell such patterns apart, not what frauds are like.

2,000 cards pay for 35 days. Each card has a level of spending, a rate, hours of the day, and merchants that it goes
to; nine payments of ten are at one of those. A payment is the card's level times the merchant's, times chance. What is
unusual and no fraud is in it, too:

    errands     5 to 8 payments in three hours, at merchants that the card goes to
    a journey   three days at merchants that are new to the card, twice as many payments
    a treat     one payment of 6 to 10 times the usual
    change      payments of a dollar or two: parking, vending machines

Every payment of these is a fraud, and bears the label:

    testing     4 to 8 payments of a dollar or two at merchants of any kind within the hour, then 1 to 3 large ones
    a copy      6 to 12 payments within three hours, of usual size, each at another merchant
    draining    3 to 5 payments within six hours at one merchant, of 2 to 4 times the usual size
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["DAYS", "PAYMENTS", "START", "made_up_payments"]

_TIME = pa.timestamp("ms", tz="UTC")

PAYMENTS = pa.schema(
    [
        pa.field("payment_id", pa.string(), nullable=False),
        pa.field("card_id", pa.int64(), nullable=False),
        pa.field("merchant", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("amount", pa.float64(), nullable=False),
        pa.field("paid_at", _TIME, nullable=False),
        pa.field("fraud", pa.bool_(), nullable=False),
    ]
)

START, DAYS = "2024-03-01", 35
CARDS, MERCHANTS = 2_000, 3_000
KINDS = ("grocery", "restaurant", "fuel", "clothes", "online", "travel")
_SHARES = (0.34, 0.24, 0.12, 0.12, 0.12, 0.06)
_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000
#: How often in a week: errands, journeys, frauds of a card.
_ERRANDS, _JOURNEYS, _FRAUDS = 0.35, 0.05, 0.04
#: Share of payments that are treats, and change.
_TREATS, _CHANGE = 0.005, 0.04
#: How much is paid at which hour of the day.
_HOURS = np.array([1, 1, 1, 1, 1, 2, 4, 8, 10, 10, 11, 14, 16, 13, 11, 12, 15, 18, 19, 16, 11, 7, 4, 2], np.float64)

_Floats = npt.NDArray[np.floating[Any]]


class _Card:
    """Makes up the payments of one card: times in ms after the start, merchants, amounts, whether a fraud."""

    def __init__(self, rng: np.random.Generator, levels: _Floats, favoured: _Floats) -> None:
        self._rng, self._levels, self._favoured = rng, levels, favoured
        self._level = rng.lognormal(2.6, 0.7)
        self._per_day = rng.lognormal(0.7, 0.5)
        self._usual = self._any_merchants(int(rng.integers(12, 40)))
        self.payments: list[tuple[int, int, float, bool]] = []

    def live(self) -> None:
        rng = self._rng
        for day in range(DAYS):
            self._pay_as_usual(day, self._per_day, journey=False)
        for _ in range(rng.poisson(_ERRANDS * DAYS / 7)):
            times = self._times(int(rng.integers(5, 9)), 3.0)
            self._add(times, rng.choice(self._usual, len(times)))
        for _ in range(rng.poisson(_JOURNEYS * DAYS / 7)):
            first = int(rng.integers(0, DAYS - 3))
            for day in range(first, first + 3):
                self._pay_as_usual(day, 2 * self._per_day, journey=True)
        for _ in range(rng.poisson(_FRAUDS * DAYS / 7)):
            (self._test, self._copy, self._drain)[int(rng.integers(3))]()

    def _pay_as_usual(self, day: int, rate: float, *, journey: bool) -> None:
        rng = self._rng
        n = int(rng.poisson(rate))
        hours = rng.choice(24, n, p=_HOURS / _HOURS.sum())
        times = day * _DAY_MS + (hours * _HOUR_MS + rng.integers(0, _HOUR_MS, n))
        merchants = np.where(
            rng.random(n) < (0.0 if journey else 0.9), rng.choice(self._usual, n), self._any_merchants(n)
        )
        factors = np.where(rng.random(n) < _TREATS, rng.uniform(6, 10, n), 1.0)
        self._add(times, merchants, factors)
        for i in np.flatnonzero(rng.random(n) < _CHANGE).tolist():
            time, merchant, _, fraud = self.payments[len(self.payments) - n + i]
            self.payments[len(self.payments) - n + i] = time, merchant, rng.uniform(0.5, 2.5), fraud

    def _test(self) -> None:
        rng = self._rng
        times = self._times(int(rng.integers(5, 12)), 1.0)
        large = min(int(rng.integers(1, 4)), len(times) - 4)
        merchants = self._any_merchants(len(times), favoured=False)
        self._add(times[:-large], merchants[:-large], amounts=rng.uniform(0.5, 2.5, len(times) - large), fraud=True)
        self._add(times[-large:], merchants[-large:], rng.uniform(3, 6, large), fraud=True)

    def _copy(self) -> None:
        times = self._times(int(self._rng.integers(6, 13)), 3.0)
        self._add(times, self._any_merchants(len(times), favoured=False), fraud=True)

    def _drain(self) -> None:
        times = self._times(int(self._rng.integers(3, 6)), 6.0)
        merchants = np.repeat(self._any_merchants(1, favoured=False), len(times))
        self._add(times, merchants, self._rng.uniform(2, 4, len(times)), fraud=True)

    def _times(self, n: int, hours: float) -> npt.NDArray[np.int64]:
        start = self._rng.integers(0, DAYS * _DAY_MS - 6 * _HOUR_MS)
        return np.sort(start + self._rng.integers(0, int(hours * _HOUR_MS), n))

    def _any_merchants(self, n: int, *, favoured: bool = True) -> npt.NDArray[np.int64]:
        return self._rng.choice(MERCHANTS, n, p=self._favoured if favoured else None)

    def _add(
        self,
        times: npt.NDArray[np.int64],
        merchants: npt.NDArray[np.int64],
        factors: _Floats | float = 1.0,
        *,
        amounts: _Floats | None = None,
        fraud: bool = False,
    ) -> None:
        if amounts is None:
            amounts = self._level * self._levels[merchants] * self._rng.lognormal(0.0, 0.45, len(times)) * factors
        for time, merchant, amount in zip(times.tolist(), merchants.tolist(), amounts.tolist(), strict=True):
            self.payments.append((time, merchant, max(0.01, round(amount, 2)), fraud))


def made_up_payments(seed: int) -> pa.Table:
    """Make up the payments, of `PAYMENTS`, in the order of time; the same for the same seed."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(KINDS), MERCHANTS, p=_SHARES)
    levels = rng.lognormal(0.0, 0.5, MERCHANTS) * np.where(kinds == KINDS.index("travel"), 4.0, 1.0)
    favoured = 1.0 / (1.0 + rng.permutation(MERCHANTS)) ** 0.7
    favoured /= favoured.sum()
    rows: list[tuple[Any, ...]] = []
    for card_id, of_card in enumerate(rng.spawn(CARDS), 1):
        card = _Card(of_card, levels, favoured)
        card.live()
        rows += [(time, card_id, *rest) for time, *rest in card.payments]
    rows.sort()
    times, cards, merchants, amounts, frauds = zip(*rows, strict=True)
    start = np.datetime64(START, "ms")
    return pa.table(
        {
            "payment_id": [f"p{n}" for n in range(len(rows))],
            "card_id": cards,
            "merchant": [f"m{merchant}" for merchant in merchants],
            "kind": [KINDS[kinds[merchant]] for merchant in merchants],
            "amount": amounts,
            "paid_at": pa.array(start + np.array(times, "timedelta64[ms]")).cast(_TIME),
            "fraud": frauds,
        },
        schema=PAYMENTS,
    )
