"""The definition of `bench users`: the reference view four times, each over a source of its own with other users.

The sources have no event id: what is measured is reading, and ids of 22 M events would take 4 GB.
"""

from __future__ import annotations

from dataclasses import replace

from millpond.bench import reference  # the module: its source and view are not to be declared here, too

__all__ = ["SIZES", "models", "name_of"]

#: Numbers of users, by the names that figures bear.
SIZES = {"10k": 10_000, "100k": 100_000, "1m": 1_000_000, "10m": 10_000_000}


def name_of(size: str) -> str:
    """Return the name of the source, the view and the model of a size."""
    return f"users_{size}"


_views = [
    replace(
        reference.user_activity,
        name=name_of(size),
        source=replace(reference.activity, name=name_of(size), event_id=None),
    )
    for size in SIZES
]
models = [replace(reference.reference, name=view.name, features=list(view)) for view in _views]
