"""Windows and tiles: how long, how wide, and which tiles a window covers.

A window of length W is answered from tiles of one width w, taken from a fixed ladder by W alone:
the widest width that is at most W/60; an aggregation of large partials may have wider ones. Tile k
covers the times `[k*w, (k+1)*w)`. Read at `as_of`,
the window covers `[floor((as_of - W)/w)*w, as_of]`: never too short, at most one tile (1.7 %) too
long. An exact window keeps the milliseconds of its tiles besides and covers `(as_of - W, as_of]`.
All times and lengths are int64 milliseconds.
"""

from __future__ import annotations

import re

from millpond.feature_actors.errors import DeclarationError

__all__ = ["LADDER_MS", "TILES_PER_WINDOW_MIN", "exact_past_ms", "parse_length_ms", "parse_window_ms", "tile_width_ms"]

_SECOND, _MINUTE, _HOUR, _DAY = 1_000, 60_000, 3_600_000, 86_400_000
_UNITS_MS = {"ms": 1, "s": _SECOND, "m": _MINUTE, "h": _HOUR, "d": _DAY, "w": 7 * _DAY}

#: Tile widths, each a multiple of the next finer one.
LADDER_MS: tuple[int, ...] = (
    10, 50, 100, 500,
    1 * _SECOND, 5 * _SECOND, 15 * _SECOND, 30 * _SECOND,
    1 * _MINUTE, 5 * _MINUTE, 10 * _MINUTE, 20 * _MINUTE,
    1 * _HOUR, 2 * _HOUR, 4 * _HOUR, 12 * _HOUR,
    1 * _DAY, 2 * _DAY, 6 * _DAY, 30 * _DAY,
)  # fmt: skip

#: A window has at least this many tiles, so that it is at most 1/60 = 1.7 % too long.
TILES_PER_WINDOW_MIN = 60

WINDOW_MIN_MS = _SECOND
#: Ten years: a longer window is a lifetime feature with a `ttl`.
WINDOW_MAX_MS = 3_660 * _DAY


def parse_length_ms(text: object) -> int | None:
    """Return a length of time such as `"90s"`, `"30m"`, `"24h"`, `"7d"` in milliseconds, None if it is no such text.

    >>> parse_length_ms("500ms"), parse_length_ms("0s"), parse_length_ms("1 hour")
    (500, 0, None)
    """
    match = re.fullmatch(r"([0-9]{1,12})(ms|s|m|h|d|w)", text) if isinstance(text, str) else None
    return None if match is None else int(match[1]) * _UNITS_MS[match[2]]


def parse_window_ms(text: str, *, subject: str) -> int:
    """Return the length of a window or a ttl in milliseconds.

    Raises `DeclarationError` that names `subject` if the text is no length, or the length is
    shorter than a second (its tiles would be finer than the finest of the ladder) or above ten years.

    >>> parse_window_ms("30d", subject="feature `spend`")
    2592000000
    """
    length_ms = parse_length_ms(text)
    if length_ms is None:
        raise DeclarationError(f"{subject}: expected a length such as `90s`, `30m`, `24h` or `7d`, got {text!r}")
    if length_ms < WINDOW_MIN_MS:
        raise DeclarationError(
            f"{subject}: window `{text}` is shorter than {TILES_PER_WINDOW_MIN} tiles of the finest "
            f"width ({LADDER_MS[0]} ms); allowed is `1s` and longer"
        )
    if length_ms > WINDOW_MAX_MS:
        raise DeclarationError(
            f"{subject}: window `{text}` is longer than `3660d`; leave `window` out for a lifetime "
            "feature, with a `ttl` if it should be forgotten"
        )
    return length_ms


def tile_width_ms(window_ms: int, tiles_min: int = TILES_PER_WINDOW_MIN) -> int:
    """Return the width of the tiles that answer a window: a function of its length, and of how many there are to be.

    >>> [tile_width_ms(w) for w in (1_000, 3_600_000, 86_400_000, 2_592_000_000)]
    [10, 60000, 1200000, 43200000]
    >>> tile_width_ms(86_400_000, tiles_min=12)
    7200000
    """
    return max(width for width in LADDER_MS if width * tiles_min <= window_ms)


def exact_past_ms(window_ms: int) -> int:
    """Return how long ago an exact window may be read as of: as long as it is, an hour at most.

    >>> exact_past_ms(60_000), exact_past_ms(86_400_000)
    (60000, 3600000)
    """
    return min(window_ms, _HOUR)
