"""Times as commands take them."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from millpond.feature_actors.errors import BadRequest
from millpond.feature_actors.windows import parse_length_ms

__all__ = ["time_of"]

#: Of milliseconds until the year 5138, after which nobody asks.
_DIGITS_MAX = 14


def time_of(option: str, text: str | None) -> int | None:
    """Return a time in milliseconds: ISO 8601, of UTC unless it says another zone, milliseconds since the epoch, or how
    long ago it was, such as `24h`.

    >>> time_of("--since", "2024-01-01"), time_of("--since", "1704067200000")
    (1704067200000, 1704067200000)
    """
    if text is None:
        return None
    if (ago_ms := parse_length_ms(text)) is not None:
        return time.time_ns() // 1_000_000 - ago_ms
    if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX:
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequest(
            f"{option}: got {text!r:.80}; a time is ISO 8601, or milliseconds since the epoch, or how long ago: `24h`"
        ) from None
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000)
