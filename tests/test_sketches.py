"""The sketches keep to the errors that they state, whatever the values, their order and their tiles.

A few random programs by default; 1,000 of each sketch on demand, the worst printed:

    MILLPOND_EXAMPLES=100 pytest -q -s tests/test_sketches.py -k stated
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.bench.sketch_programs import SHAPES, Sketch, draw_program, worst_of
from millpond.feature_actors import Distinct, Median, Quantile
from millpond.feature_actors.aggregations import Aggregation
from millpond.feature_actors.aggregations.quantile import LEVEL_MAX

SKETCHES: tuple[Aggregation, ...] = (
    *(Distinct("v", m=m) for m in (8, 16, 128, 1_024, 4_096)),
    *(Quantile("v", q, error, m) for q in (0, 0.01, 0.5, 0.999, 1) for error, m in ((0.01, 128), (0.0001, 8))),
    Quantile("v", 0.9, 0.25, 4_096), Median("v"),
)  # fmt: skip
#: Of these the state is compared: what a quantile is asked for does not change it.
STATES = [Sketch(one) for one in (*(Distinct("v", m=m) for m in (8, 16, 128)), Median("v", 0.01, 8), Median("v"))]
#: As of conftest.
EXAMPLES = float(os.environ.get("MILLPOND_EXAMPLES", "1"))
GUARD = 0x5A5A_5A5A_5A5A_5A5A
ODD_WORDS = [-1, 0, 3, 8, 9, 1 << 32, (31 << 32) + 5, -(2**63), 2**63 - 1, GUARD]
seeds = st.integers(0, 2**32).map(np.random.default_rng)


def name(sketch: Sketch) -> str:
    return " ".join(str(v) for v in sketch.aggregation.identity().values() if v not in (None, "", "v"))


@pytest.mark.parametrize("sketch", [Sketch(one) for one in SKETCHES], ids=name)
def test_the_error_is_within_what_is_stated(sketch: Sketch) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    worst = worst_of(sketch, np.random.default_rng(seed), programs := max(2, round(10 * EXAMPLES)))
    shown = (
        f"{name(sketch)}: {worst.share:.3f} of the bound at worst of {programs} programs of seed {seed}: "
        f"{worst.got!r} for {worst.exact!r} of {len(worst.program.values)} values, {worst.program.shape}"
    )
    print(shown)  # noqa: T201
    assert worst.share <= 1, shown


@pytest.mark.parametrize("sketch", STATES, ids=name)
@given(draw=seeds, shape=st.sampled_from(sorted(SHAPES)))
def test_the_state_is_one_of_the_set_of_values_whatever_their_order_and_tiles(
    sketch: Sketch, draw: np.random.Generator, shape: str
) -> None:
    program = draw_program(draw, shape, values_max=2_000)
    at_once = sketch.of(program.values)
    assert np.array_equal(sketch.merged(program.tiles), at_once)
    shuffled = draw.permutation(program.values)
    assert np.array_equal(sketch.of(shuffled), at_once)
    tiles = [sketch.of(values) for values in np.array_split(shuffled, draw.integers(1, 12))]
    while len(tiles) > 1:  # neighbours in any order, not only from the left
        place = int(draw.integers(0, len(tiles) - 1))
        newer = tiles.pop(place + 1)
        before = newer.copy()
        sketch.merge(tiles[place], newer)
        assert np.array_equal(newer, before)
    assert np.array_equal(tiles[0], at_once)


@pytest.mark.parametrize("sketch", STATES, ids=name)
@given(draw=seeds)
def test_a_torn_partial_harms_no_neighbour_and_its_merge_comes_to_an_end(
    sketch: Sketch, draw: np.random.Generator
) -> None:
    """A reader merges what is being written, or was another thing a moment ago, and throws away what comes of it."""

    def values() -> Any:
        return draw.normal(0, 9, draw.integers(0, 40)).round(1)

    size = sketch.column.words
    memory = np.full(size + 2, GUARD)
    memory[1:-1] = sketch.of(values())
    for _ in range(3):
        torn = np.full(size + 2, GUARD)
        torn[1:-1] = sketch.of(values())
        for place in draw.integers(1, size + 1, draw.integers(1, size + 1)):
            torn[place] = draw.choice(ODD_WORDS)
        torn[1] = draw.choice(ODD_WORDS)
        before = torn.copy()
        sketch.merge(memory[1:-1], torn[1:-1])
        sketch.value(memory[1:-1])
        assert np.array_equal(torn, before)
        assert memory[[0, -1]].tolist() == [GUARD, GUARD]


# -- by hand


def test_a_quantile_is_between_two_values_as_numpys_is() -> None:
    values = [3.0, -1.0, 0.0, 1e300, 2.0, 2.0, -5e-324]
    for q in (0, 0.1, 0.25, 0.3, 0.5, 0.85, 1):
        exact = Quantile("v", q).plain([(0, value) for value in values], 0)
        assert exact == pytest.approx(np.quantile(values, q), rel=1e-12, abs=0)


@pytest.mark.parametrize("value", [0.0, -0.0, 5e-324, -5e-324, 2.2e-308, 1.0, -1.0, 1.7976931348623157e308, -1e308])
@pytest.mark.parametrize("error", [0.0001, 0.01, 0.25])
def test_any_number_will_do(value: float, error: float) -> None:
    sketch = Sketch(Median("v", error))
    assert sketch.value(sketch.of(np.array([value]))) == pytest.approx(value, rel=error * (1 + 1e-9), abs=1e-323)


def test_a_level_up_squares_gamma_and_five_buckets_hold_all_numbers() -> None:
    sketch = Sketch(Quantile("v", 0.5, 0.01, 8))
    powers = (1.01 / 0.99) ** (np.arange(16) + 0.5)
    for n, levels in ((8, 0), (9, 1), (16, 1)):
        words = sketch.of(powers[:n])
        assert words[0] >> 32 == levels
        assert sketch.aggregation.error_of(powers[:n]) == pytest.approx([0.01, 0.02 / 1.0001][levels], rel=1e-12)
    largest = np.array([0.0, *(s * v for s in (-1, 1) for v in np.geomspace(1e-300, 1e300, 500)), 5e-324])
    finest = Sketch(Quantile("v", 0.5, 0.0001, 8))
    assert finest.of(largest)[0] >> 32 < LEVEL_MAX


def test_a_count_stays_at_its_largest() -> None:
    sketch = Sketch(Quantile("v", 1, 0.01, 8))
    words = sketch.of(np.array([1.0, 2.0]))
    words[1] |= 0xFFFF_FFFF
    full = words.copy()
    sketch.merge(words, sketch.of(np.array([1.0])))
    assert np.array_equal(words, full)
    assert sketch.value(words) == pytest.approx(2, rel=0.01)


#: What `Distinct` of m says of the strings "0", "1", ... and of as many integers: the same on every cluster, for ever.
ESTIMATES = {
    (8, 8): (8, 8),
    (9, 8): (8.565122055545253, 8.5612442504363),
    (128, 128): (128, 128),
    (129, 128): (131.01350077609854, 125.39204642561046),
    (1_000, 128): (1008.1021115026493, 1026.0814384162557),
    (50_000, 128): (49367.03449947999, 50081.809176015435),
    (50_000, 4_096): (50173.07907903324, 50150.397658754344),
}


@pytest.mark.parametrize(("n", "m"), ESTIMATES)
def test_the_same_events_give_the_same_estimate_on_every_cluster(n: int, m: int) -> None:
    sketch = Sketch(Distinct("v", m=m))
    columns = pa.array([str(i) for i in range(n)]), pa.array(range(n))
    assert tuple(sketch.value(sketch.of(column)) for column in columns) == ESTIMATES[n, m]
