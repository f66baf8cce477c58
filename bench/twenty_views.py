"""The definition of `bench models`: twenty views of users, five over each of four sources; the models come later."""

from __future__ import annotations

from dataclasses import replace

from millpond.bench import reference  # the module: its source is not to be declared here, too
from millpond.feature_actors import Count, FeatureView, Last, Max, SecondsSince, Sum

__all__ = ["sources", "views"]

_WINDOWS = (("1h", "6h", "24h"), ("2h", "12h", "3d"), ("30m", "4h", "7d"), ("15m", "1h", "24h"), ("3h", "24h", "7d"))

sources = [replace(reference.activity, name=f"activity_{s}") for s in range(4)]

views = {
    f"view_{s}{w}": FeatureView(
        f"view_{s}{w}",
        owner="bench",
        source=source,
        key=["user_id"],
        features={
            **{f"count_{window}": Count(window=window) for window in windows},
            **{f"sum_{window}": Sum("amount", window=window) for window in windows},
            **{f"max_{window}": Max("amount", window=window) for window in windows},
            "last_amount": Last("amount"),
            "recency_s": SecondsSince(),
        },
    )
    for s, source in enumerate(sources)
    for w, windows in enumerate(_WINDOWS)
}
