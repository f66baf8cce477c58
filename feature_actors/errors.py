"""Errors that Millpond answers with.

One root class, so that a caller can catch everything of ours, and one subclass per thing that the
caller can do about it. Every error crosses a process boundary whole: it pickles by its own fields
(Ray re-creates it on the other side), and `as_json` is the body of an HTTP answer.

A message reads *subject: what we got; what is allowed; what to do*, the path says where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "AsOfInPast",
    "BadRequest",
    "DeclarationError",
    "MillpondError",
    "NotFound",
    "Problem",
    "TooLarge",
    "TooMany",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMediaType",
    "did_you_mean",
    "error_from_wire",
    "error_to_wire",
]

#: One bad value: (message, path).
Problem = tuple[str, str]


class MillpondError(Exception):
    """Base of all errors; `status` is the HTTP status that it is answered with."""

    code = "error"
    status = 500

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        code: str | None = None,
        problems: tuple[Problem, ...] = (),
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.code = code or type(self).code
        self.problems = problems
        self.retry_after_ms = retry_after_ms

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            type(self),
            self.message,
            self.path,
            self.code,
            self.problems,
            self.retry_after_ms,
        )

    def __str__(self) -> str:
        return f"{self.message} - at `{self.path}`" if self.path else self.message

    def as_json(self) -> dict[str, Any]:
        """Return the body of the HTTP answer, `{"error": {"code", "message", "path"}}`."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, "path": self.path}
        if len(self.problems) > 1:
            error["problems"] = [{"message": m, "path": p} for m, p in self.problems]
        return {"error": error}


def _rebuild(
    cls: type[MillpondError],
    message: str,
    path: str | None,
    code: str,
    problems: tuple[Problem, ...],
    retry_after_ms: int | None,
) -> MillpondError:
    return cls(message, path=path, code=code, problems=problems, retry_after_ms=retry_after_ms)


class DeclarationError(MillpondError):
    """A source, view, model or setting is declared wrongly: mend the declaration."""

    code, status = "bad_declaration", 400


class BadRequest(MillpondError):
    """The request is wrong: mend it; sending it again unchanged is useless."""

    code, status = "bad_request", 400


class Unauthorized(MillpondError):
    """The call needs the admin token of the cluster."""

    code, status = "unauthorized", 401


class NotFound(MillpondError):
    """There is no such source, view or model."""

    code, status = "not_found", 404


class AsOfInPast(MillpondError):
    """The asked `as_of` lies before what has been applied already."""

    code, status = "as_of_in_past", 409


class TooLarge(MillpondError):
    """A stated limit is exceeded: send less at a time, or raise the limit."""

    code, status = "too_large", 413


class UnsupportedMediaType(MillpondError):
    """The body is of a type that this call does not read."""

    code, status = "unsupported_media_type", 415


class TooMany(MillpondError):
    """More is waiting than a stated limit allows: try again after `retry_after_ms`, or raise the limit."""

    code, status = "too_many", 429


class Unavailable(MillpondError):
    """Nothing is wrong with the request: try again after `retry_after_ms`."""

    code, status = "unavailable", 503


def error_to_wire(error: MillpondError) -> list[Any]:
    """Return an error as names, texts and numbers."""
    kind = next(c.__name__ for c in type(error).__mro__ if c.__name__ in _kinds())
    return [
        kind,
        error.message,
        error.path,
        error.code,
        [list(p) for p in error.problems],
        error.retry_after_ms,
        error.status,
    ]


def error_from_wire(wire: list[Any]) -> MillpondError:
    """Return the error again: of its class, or of the nearest that this process knows, with its code and status."""
    kind, message, path, code, problems, retry_after_ms, status = wire
    of = _kinds().get(kind, MillpondError)
    error = _rebuild(of, message, path, code, tuple((m, p) for m, p in problems), retry_after_ms)
    error.status = status
    return error


def _kinds() -> dict[str, type[MillpondError]]:
    """Return the classes of this module by name; subclasses elsewhere keep their code."""
    ours: list[type[MillpondError]] = [MillpondError, *MillpondError.__subclasses__()]
    return {c.__name__: c for c in ours if c.__module__ == __name__}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; known: ...; did you mean ...?` for an unknown name.

    >>> did_you_mean("paymets", ["logins", "payments"])
    '; known: `logins`, `payments`; did you mean `payments`?'
    """
    names = sorted(known)
    shown = ", ".join(f"`{n}`" for n in names[:20]) + (", ..." if len(names) > 20 else "")
    if len(names) > 100:  # comparing takes 20 us each, and whoever asks for names that there are not may ask often
        names = [n for n in names if n[:2] == name[:2]][:100]
    near = difflib.get_close_matches(name, names, n=1)
    return f"; known: {shown or 'none'}" + (f"; did you mean `{near[0]}`?" if near else "")
