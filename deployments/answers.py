"""Answers of scores as JSON, put together from parts that are encoded already.

`{"id", "model", "version", "result", "as_of", "unknown"}`, one object per id: for a thousand of them a dictionary
each would cost more than their features and predictions. Among several, an id that its model failed on has
`{"error": {..., "status"}}` in its place.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from millpond.deployments.lane import Lane, Scored
from millpond.deployments.score_log import ScoreLog
from millpond.feature_actors.errors import MillpondError
from millpond.models.model import PredictionFailed

__all__ = ["Answers", "iso", "told"]


def _raise(result: Any) -> Any:
    """Raise what stands in place of a result: nothing else comes here, and good results cost nothing by it."""
    raise result


_encode = msgspec.json.Encoder(enc_hook=_raise).encode


def iso(ms: int) -> str | None:
    """Return a time as ISO 8601 UTC with milliseconds; None for "no event ever" of an event clock.

    >>> iso(1_700_000_000_042)
    '2023-11-14T22:13:20.042Z'
    """
    if ms < 0:
        return None
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(ms // 1_000))}.{ms % 1_000:03}Z"


def told(error: MillpondError, path: str | None = None) -> bytes:
    """Return what stands in place of an answer."""
    as_json = error.as_json()["error"]
    return msgspec.json.encode({"error": {**as_json, "path": path or error.path, "status": error.status}})


class Answers:
    """Make answers, each with an id of its own: unique over replicas by its random half, in order within one.

    score_log: gets those that were sampled.
    """

    def __init__(self, score_log: ScoreLog | None = None) -> None:
        self._score_log = score_log
        self._half = secrets.token_hex(6)
        self._prefix = b'{"id":"' + self._half.encode()
        self._numbers = itertools.count(1)
        # Times of answers that follow each other are mostly of the same second: which one, and how it begins as JSON.
        self._second: int | None = None
        self._begin = b""

    def one(self, lane: Lane, scored: Scored, row: int) -> bytes:
        """Return the answer of a row that a lane has scored. Raises `PredictionFailed` if the model failed on it."""
        rows, unknown, number = scored.rows, scored.rows.unknown[row], next(self._numbers)
        at_ms = int(rows.as_of[row])
        if scored.sampled is not None:
            self._log(lane, scored, row, number)
        return b'%b%010x%b%b,"as_of":%b,"unknown":%b%b}' % (
            self._prefix,
            number,
            lane.label,
            _encode(scored.results[row]),
            b'%b%03dZ"' % (self._begin, at_ms % 1_000) if at_ms // 1_000 == self._second else self._time(at_ms),
            _encode(unknown) if unknown else b"[]",
            b"" if scored.values is None else b',"features":' + _encode(scored.values[row]),
        )

    def list(self, answered: Iterable[tuple[Lane, Scored, int]]) -> bytes:
        """Return the answers of several rows as a JSON array."""
        return b"[%b]" % b",".join(self.each(answered, "$[%d]"))

    def each(self, answered: Iterable[tuple[Lane, Scored, int]], path: str) -> Sequence[bytes]:
        """Return the answers of several rows; path: of one of them, told where its model failed on it."""
        answers: list[bytes] = []
        for i, (lane, scored, row) in enumerate(answered):
            try:
                answers.append(self.one(lane, scored, row))
            except PredictionFailed as error:
                answers.append(told(error, path % i))
        return answers

    def ids(self, answered: Sequence[tuple[Lane, Scored, int]]) -> Sequence[str]:
        """Return ids for the answers of several rows, which somebody else makes."""
        numbers = list(itertools.islice(self._numbers, len(answered)))
        for (lane, scored, row), number in zip(answered, numbers, strict=True):
            if scored.sampled is not None:
                self._log(lane, scored, row, number)
        return [self._id(number) for number in numbers]

    def _id(self, number: int) -> str:
        return f"{self._half}{number:010x}"

    def _log(self, lane: Lane, scored: Scored, row: int, number: int) -> None:
        assert scored.sampled is not None
        if self._score_log is not None and row in scored.sampled.places:
            self._score_log.add(lane, scored, row, self._id(number))

    def _time(self, ms: int) -> bytes:
        """Return `iso` of a time as JSON."""
        second, rest = divmod(ms, 1_000)
        if second != self._second:
            text = iso(ms)
            if text is None:
                return b"null"
            self._second, self._begin = second, b'"' + text[:-4].encode()
        return b'%b%03dZ"' % (self._begin, rest)
