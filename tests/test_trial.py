"""Trials: whatever the code that is tried out does, the process that asks for it goes on and is told."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millpond.cluster.trial import in_trial
from millpond.feature_actors.errors import DeclarationError, NotFound


def crash() -> None:
    ctypes.string_at(0)


def test_what_is_returned_comes_back_whole() -> None:
    content = os.urandom(3_000_000)
    assert in_trial("it", lambda: content, 60) == content


def test_an_error_of_ours_is_raised_as_it_was() -> None:
    def work() -> bytes:
        raise NotFound("no model `x`", path="$")

    with pytest.raises(NotFound) as caught:
        in_trial("it", work, 60)
    assert (caught.value.message, caught.value.path, caught.value.code) == ("no model `x`", "$", "not_found")


@pytest.mark.parametrize("way_out", [lambda: os._exit(0), lambda: os._exit(3), crash, lambda: 1 / 0])
def test_a_process_that_ends_is_told_of(way_out: Callable[[], Any]) -> None:
    with pytest.raises(DeclarationError, match=r"^it: its code ended the process that tried it out; nothing has been"):
        in_trial("it", lambda: way_out() or b"", 60)


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    def hang() -> bytes:
        (tmp_path / "pid").write_text(f"{os.getpid()} {tempfile.mkdtemp()}")
        threading.Event().wait()
        return b""

    with pytest.raises(DeclarationError, match=r"^it: took longer than 1 s to be tried out; nothing has been changed"):
        in_trial("it", hang, 1.0)
    pid, left = (tmp_path / "pid").read_text().split()
    assert not Path("/proc", pid).exists()
    assert not Path(left).exists()
