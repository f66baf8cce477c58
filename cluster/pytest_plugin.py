"""The fixture of the test kit, there in every pytest of an environment that has Millpond.

It stands in this folder because that imports nothing by itself: who tests something else pays nothing for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from os import PathLike
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from millpond.feature_actors.testing import TestCluster

__all__ = ["millpond_cluster", "pytest_collection_finish"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Load the kernels (or compile them, once a machine), so that no test's time is that of the loading."""
    uses_kit = "millpond.feature_actors.testing" in sys.modules or any(
        "millpond_cluster" in getattr(item, "fixturenames", ()) for item in session.items
    )
    if uses_kit and session.items and not session.config.option.collectonly:
        from millpond.feature_actors.warm import warm_kernels

        warm_kernels()


@pytest.fixture
def millpond_cluster() -> Iterator[Callable[..., TestCluster]]:
    """Make clusters in this process that are checked and closed after the test.

    `millpond_cluster(views, models)`, or of definition files, `millpond_cluster("churn.py")`: see `TestCluster`.
    """
    from millpond.feature_actors.testing import TestCluster

    with contextlib.ExitStack() as stack:

        def make(*declared: Any, **options: Any) -> TestCluster:
            of_files = bool(declared) and isinstance(declared[0], str | PathLike)
            kind = TestCluster.of_file if of_files else TestCluster
            return stack.enter_context(kind(*declared, **options))

        yield make
