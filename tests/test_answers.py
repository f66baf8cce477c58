"""Answers put together from encoded parts."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from millpond.deployments.answers import Answers, iso

times = st.integers(-10_000, 10_000) | st.integers(1_700_000_000_000, 1_700_000_003_000) | st.integers(-(2**40), 2**43)


@given(st.lists(times, min_size=1, max_size=20))
def test_whatever_times_follow_each_other_each_is_said_as_it_would_be_alone(asked: list[int]) -> None:
    answers = Answers()
    assert [json.loads(answers._time(ms)) for ms in asked] == [iso(ms) for ms in asked]
