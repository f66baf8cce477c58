"""What the client is answered: what a call returns, and the errors that it raises. Knows nothing of HTTP libraries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

__all__ = [
    "Ack",
    "ClientError",
    "NotSent",
    "Problem",
    "RequestFailed",
    "RequestRefused",
    "Score",
    "TryAgainLater",
    "ViewFeatures",
    "error_of_answer",
    "error_of_model",
]

#: One bad value: (message, path).
Problem = tuple[str, str]

#: The row in a path, of rows or of the ids that several models are asked about.
_ROW = re.compile(r"^(\$(?:\.ids)?)\[(\d+)\]")


@dataclass(frozen=True)
class Ack:
    """What became of events. Late, too late and unkeyed are of the accepted ones; forgotten ones were not taken, for
    their entity was forgotten after they had happened.

    >>> Ack(accepted=2, late=1) + Ack(accepted=1, duplicates=4)
    Ack(accepted=3, duplicates=4, conflicts=0, late=1, too_late=0, unkeyed=0, forgotten=0)
    """

    accepted: int = 0
    duplicates: int = 0
    conflicts: int = 0
    late: int = 0
    too_late: int = 0
    unkeyed: int = 0
    forgotten: int = 0

    def __add__(self, other: Ack) -> Ack:
        return Ack(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Score:
    """A model's answer for one id.

    id: of this answer; joins labels and explanations to it. result: a number or any JSON. as_of: of the features read.
    unknown: the views that do not know the entity. features: what was read, by full name, if it was asked for.
    """

    id: str
    model: str
    version: str
    result: Any
    as_of: datetime | None
    unknown: list[str]
    features: dict[str, Any] | None = None


@dataclass(frozen=True)
class ViewFeatures:
    """The features of a view for one entity. unknown: whether the view has no event of it."""

    view: str
    key: dict[str, Any]
    features: dict[str, Any]
    as_of: datetime | None
    unknown: bool


class ClientError(Exception):
    """Base of all that the client raises; `code`, `message`, `path` and `problems` are those of the cluster's answer.

    status: of HTTP, None if there was no answer. tries: how often the request was sent.

    If events were sent: `ack` is what became of those before `first_row`, the first row that is not acknowledged;
    `send` with the same events and this `idempotency_key` completes what was begun, and counts nothing twice.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "error",
        status: int | None = None,
        path: str | None = None,
        problems: tuple[Problem, ...] = (),
        tries: int = 0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.path = path
        self.problems = problems
        self.tries = tries
        self.ack = Ack()
        self.first_row = 0
        self.idempotency_key: str | None = None

    def __str__(self) -> str:
        at = f" - at `{self.path}`" if self.path else ""
        tries = f" (tried {self.tries} times)" if self.tries > 1 else ""
        before = f"; rows before {self.first_row} are acknowledged" if self.first_row else ""
        return f"{self.message}{at}{tries}{before}"

    def at_row(self, first_row: int) -> None:
        """Have the paths count the caller's rows: the request that was answered began with `first_row`."""

        def moved(path: str) -> str:
            return _ROW.sub(lambda match: f"{match[1]}[{int(match[2]) + first_row}]", path)

        self.path = moved(self.path) if self.path else self.path
        self.problems = tuple((message, moved(path)) for message, path in self.problems)


class RequestRefused(ClientError):
    """The request is wrong: mend it; sending it again unchanged is useless."""


class RequestFailed(ClientError):
    """The cluster failed at the request, such as at a model's `predict`: an owner has to look."""


class TryAgainLater(ClientError):
    """Nothing is known to be wrong with the request, and it was tried as long as was allowed: try again later."""


class NotSent(ClientError):
    """A `Sender` could not send `events`: they were not acknowledged. Its `__cause__` is the first error."""

    def __init__(self, message: str, *, events: Sequence[Any] = (), **given: Any) -> None:
        super().__init__(message, **given)
        self.events = list(events)


class _Error(msgspec.Struct):
    code: str
    message: str
    path: str | None = None
    problems: list[dict[str, str | None]] = []


class _ErrorBody(msgspec.Struct):
    error: _Error


_decode_error = msgspec.json.Decoder(_ErrorBody).decode


def error_of_answer(call: str, status: int, content: bytes) -> ClientError:
    """Return the error that an answer other than 200 is. `call` is what was called, for answers that are not ours.

    >>> error_of_answer("GET /x", 404, b'{"error": {"code": "not_found", "message": "no call GET /x", "path": null}}')
    RequestRefused('no call GET /x')
    >>> error_of_answer("GET /x", 502, b"<html>")
    TryAgainLater('GET /x: status 502 with `<html>`, which is no answer of Millpond')
    """
    try:
        error = _decode_error(content).error
    except msgspec.MsgspecError:
        text = content[:200].decode(errors="replace")
        error = _Error("unexpected_answer", f"{call}: status {status} with `{text}`, which is no answer of Millpond")
        # A proxy has nobody behind it that answers, or lost it on the way; ours would have said so.
        again = status in (408, 429) or status >= 500
        return _as_told(error, status, again)
    return _as_told(error, status, _try_again(status))


def error_of_model(answer: Mapping[str, Any]) -> ClientError:
    """Return the error of one model of several that were asked.

    >>> told = {"code": "prediction_failed", "message": "predict raised", "path": None, "status": 500}
    >>> error_of_model({"error": told})
    RequestFailed('predict raised')
    """
    error, status = msgspec.convert(answer, _ErrorBody).error, int(answer["error"]["status"])
    return _as_told(error, status, _try_again(status))


def _try_again(status: int) -> bool:
    # A 504 of ours is a model that takes too long: it would do so again. A body that came too slowly may not.
    return status in (408, 429, 502, 503)


def _as_told(error: _Error, status: int, again: bool) -> ClientError:
    kind = TryAgainLater if again else RequestRefused if 400 <= status < 500 else RequestFailed
    problems = tuple((p.get("message") or "", p.get("path") or "") for p in error.problems)
    return kind(error.message, code=error.code, status=status, path=error.path, problems=problems)
