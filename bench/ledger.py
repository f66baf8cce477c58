"""The ledger: what was acknowledged, an account for each user and each item, and what the cluster counts of it.

An event stands in the accounts of its user and of its item. The cluster's answers of `accounts` are compared with the
ledger account by account: what one account lacks and another has too much does not cancel out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from millpond.cluster.demo.session import Session
from millpond.feature_actors.errors import Unavailable

__all__ = ["Difference", "Ledger", "differences", "read_accounts"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_IDS_MAX = 5_000


@dataclass(frozen=True)
class Difference:
    """One account that is not what was acknowledged: events lost, and events counted twice, at least."""

    account: int
    lost: int
    double: int
    expected: tuple[float, float]
    found: tuple[float, float]


def differences(expected: Floats, found: Floats) -> list[Difference]:
    """Return the accounts that differ, of float64 [n, 2]: number and sum of the events of each.

    Where the numbers agree and the sums do not, one event was lost and another counted twice, at least.

    >>> [(d.account, d.lost, d.double) for d in differences(
    ...     np.array([[3, 30.0], [2, 9.0], [1, 5.0], [0, 0.0]]), np.array([[3, 30.0], [4, 18.0], [0, 0.0], [0, 0.0]]))]
    [(1, 0, 2), (2, 1, 0)]
    """
    found_differences = []
    for i in np.flatnonzero((expected != found).any(axis=1)).tolist():
        more = int(found[i, 0] - expected[i, 0])
        lost, double = (1, 1) if more == 0 else (max(0, -more), max(0, more))
        found_differences.append(Difference(i, lost, double, tuple(expected[i].tolist()), tuple(found[i].tolist())))
    return found_differences


class Ledger:
    """Accounts of so many users and items; may be written to by several threads."""

    def __init__(self, users: int, items: int) -> None:
        self.users, self.items = np.zeros((users, 2)), np.zeros((items, 2))
        self.events = 0
        self._lock = threading.Lock()

    def acknowledge(self, users: Ints, items: Ints, amounts: Floats) -> None:
        """Write down n acknowledged events."""
        with self._lock:
            self.events += len(users)
            for accounts, rows in ((self.users, users), (self.items, items)):
                np.add.at(accounts[:, 0], rows, 1.0)
                np.add.at(accounts[:, 1], rows, amounts)


def read_accounts(
    url: str, model: str, key: str, ids: Sequence[Any], done: Callable[[int], None] = lambda n: None
) -> Floats:
    """Score a model of `accounts` for all ids, in batches; return float64 [n, columns].

    Raises `Unavailable` if a batch is not answered.
    """
    session, rows = Session(url), list[Any]()
    for at in range(0, len(ids), _IDS_MAX):
        part = ids[at : at + _IDS_MAX]
        answers = session.post(f"/v1/score/{model}", msgspec.json.encode([{key: one} for one in part]))
        if answers is None:
            raise Unavailable(f"the accounts cannot be read: {session.first_failure}")
        rows += [answer["result"] for answer in answers]
        done(len(part))
    session.close()
    return np.array(rows, np.float64)
