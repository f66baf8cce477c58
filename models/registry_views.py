"""The views of a registry, made of the text of their definitions: for whoever extends a layout by them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millpond.feature_actors.backfill import AddedView
from millpond.feature_actors.errors import DeclarationError
from millpond.feature_actors.layout import Layout, identity_of
from millpond.feature_actors.view import FeatureView
from millpond.models.added_views import AddedViewRecord
from millpond.models.definition import Definition
from millpond.models.registry import Registry

__all__ = ["RegistryViews", "declared_view", "extended_layout"]


def declared_view(record: AddedViewRecord) -> FeatureView:
    """Return a view by running the text that declares it (once a process). Raises `DeclarationError`."""
    views = Definition(record.file_name, record.text).declared().views
    view = next((one for one in views if identity_of(one) == record.identity), None)
    if view is None:
        raise DeclarationError(
            f"definition `{record.file_name}`: it does not declare view `{record.name}` in this process as it did when "
            "it was deployed; a definition may not depend on where it is run"
        )
    return view


def extended_layout(layout: Layout, records: Sequence[AddedViewRecord]) -> Layout:
    """Return a layout with the tables of added views behind its own. Raises `DeclarationError`.

    A version of a view goes by its name as soon as it is live, or at once if there is no other.
    """
    if not records:
        return layout
    failed = {one.identity for one in records if one.state == "failed"}
    superseded = {one.identity for one in records if one.superseded}
    names = set(layout.views)
    for one in records:
        if one.state == "live":
            names.add(one.name)
        elif not one.settled and one.name in names:
            superseded.add(one.identity)
    return layout.extended([declared_view(one) for one in records], failed, superseded)


class RegistryViews:
    """The port by which a shard hears of views. Opens the registry in the thread that asks first."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._registry: Registry | None = None
        self._views: dict[str, FeatureView] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_registry": None, "_views": {}}

    def generation(self) -> int:
        return self._open().generation()

    def added(self) -> list[AddedView]:
        return [AddedView(self._view(one), one.state) for one in self._open().views.all()]

    def _view(self, record: AddedViewRecord) -> FeatureView:
        if record.identity not in self._views:
            self._views[record.identity] = declared_view(record)
        return self._views[record.identity]

    def _open(self) -> Registry:
        if self._registry is None:
            self._registry = Registry(Path(self._folder))
        return self._registry
