"""`millpond features` says what a view is made of and what it takes, as a store bears out; the README's table too."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millpond.cluster import cli
from millpond.cluster.features import INDEX_LOAD_MAX, INDEX_LOAD_MIN, length_text
from millpond.feature_actors.aggregations import AGGREGATIONS, Aggregation, Derived, Ratio
from millpond.feature_actors.aggregations.streak_days import DAYS_PER_WORD, StreakDays
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.shard import Shard
from millpond.feature_actors.shard_map import ShardMap
from millpond.feature_actors.tiles.memory import M_USED, WORD_BYTES
from millpond.feature_actors.tiles.structure import H_PLACES, H_ROWS
from millpond.models.definition import Definition

ROOT = Path(__file__).parents[1]

DEFINITION = """
import numpy as np
import pyarrow.compute as pc

from millpond.feature_actors import Count, Derived, FeatureView, Last, LastN, Mean, Ratio, Source, Sum

orders = Source(
    "orders",
    owner="shop",
    fields={"user": "int64", "price": "float64", "category": "string", "at": "timestamp[ms, UTC]"},
    event_time="at",
)
spend = FeatureView(
    "spend",
    owner="retention",
    source=orders,
    key=["user"],
    features={
        "orders_30d": Count(window="30d"),
        "dear_30d": Count(window="30d", where=pc.field("price") > 50),
        "mean_30d": Mean("price", window="30d"),
        "exact_1h": Sum("price", window="1h", exact=True),
        "recent": LastN("price", n=3, window="7d"),
        "last_category": Last("category", ttl="365d"),
        "orders": Count(),
        "dear_share": Ratio("dear_30d", "orders_30d"),
        "log_orders": Derived(np.log1p, "orders"),
    },
)
large = FeatureView(
    "large", owner="fraud", source=orders, key=["user"], where=pc.field("price") > 1_000, features={"n": Count()}
)
categories = FeatureView("categories", owner="shop", source=orders, key=["category"], features={"n": Count(ttl="1d")})
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "spend.py"
    path.write_text(DEFINITION)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["features", *arguments])
    return status, *capsys.readouterr()


def described(capsys: pytest.CaptureFixture[str], file: Path) -> dict[str, Any]:
    status, out, err = run(capsys, str(file), "--json")
    assert (status, err) == (0, "")
    return {view["view"]: view for view in json.loads(out)}


def test_each_feature_says_what_it_is_and_what_it_takes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    views = described(capsys, file)
    assert list(views) == ["spend", "large", "categories"]
    lines = {f["feature"]: f for f in views["spend"]["features"]}
    shown = {
        name: (
            f["aggregation"],
            f["window"] or f["ttl"],
            f["tile_width_ms"],
            f["bytes_per_entity"],
            f["bytes_per_tile"],
        )
        for name, f in lines.items()
    }
    day, hour = 86_400_000, 3_600_000
    assert shown == {
        "orders_30d": ("Count()", "30d", day // 2, 4, 8),
        "dear_30d": ("Count()", "30d", day // 2, 4, 8),
        "mean_30d": ('Mean("price")', "30d", day // 2, 4, 16),
        "exact_1h": ('Sum("price")', "1h", 60_000, 4, 8),
        "recent": ('LastN("price", n=3)', "7d", 2 * hour, 4, 48),
        "last_category": ('Last("category")', "365d", None, 24, None),
        "orders": ("Count()", None, None, 8, None),
        "dear_share": ('Ratio("dear_30d", "orders_30d")', None, None, 0, None),
        "log_orders": ('Derived(log1p, "orders")', None, None, 0, None),
    }
    assert lines["dear_30d"]["where"] == "(price > 50)"
    assert lines["exact_1h"]["exact"] is True
    assert lines["exact_1h"]["bytes_per_fine_tile"] == 8
    assert lines["dear_share"]["derived_from"] == ["dear_30d", "orders_30d"]


def test_an_answer_covers_at_most_one_tile_more_than_its_window(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overhang = {
        f["feature"]: (f["overhang_ms"], f["overhang_percent"]) for f in described(capsys, file)["spend"]["features"]
    }
    assert overhang["orders_30d"] == (43_200_000, 1.67)
    assert overhang["recent"] == (7_200_000, 1.19)
    assert {overhang[name] for name in ("exact_1h", "last_category", "orders", "dear_share")} == {(0, 0.0)}
    assert all(percent <= 1.67 for _, percent in overhang.values())


def test_views_of_one_source_and_key_share_a_table(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    views = described(capsys, file)
    assert views["spend"]["kept"] == views["large"]["kept"]
    assert views["spend"]["kept"]["views"] == ["spend", "large"]
    assert views["categories"]["kept"]["views"] == ["categories"]
    series = [(s["tile_width_ms"], s["where"], s["tiles_max"]) for s in views["spend"]["kept"]["series"]]
    assert series == [
        (60_000, "", 121),  # kept an hour longer, to be read as of an hour ago
        (7_200_000, "", 85),
        (43_200_000, "", 61),
        (43_200_000, "(price > 50)", 61),
    ]


def test_a_store_takes_what_the_table_says(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An event each of many entities, dear ones, so that each has one tile in each series."""
    kept = described(capsys, file)["spend"]["kept"]
    declared = Definition.read(file).declared()
    layout = compile_layout(declared.sources, [v for v in declared.views if v.name != "categories"])
    (table,) = layout.tables
    shard, n, at = Shard(layout, ShardMap.even(1, 1), 0), 20_000, 1_700_000_000_000
    times = np.full(n, at)
    columns = [
        *(pa.array(np.arange(n)), pa.array(np.full(n, 60.0)), pa.array(["book"] * n)),
        pa.array(times).cast(pa.timestamp("ms", tz="UTC")),
    ]
    shard.apply("orders", pa.RecordBatch.from_arrays(columns, schema=layout.source("orders").schema), times, 0)
    header = shard.memory.words[table.slots_at(1) :]
    assert int(header[H_ROWS]) == n
    places = int(header[H_PLACES])
    assert INDEX_LOAD_MIN * 0.99 <= n / places <= INDEX_LOAD_MAX
    index_bytes = places * WORD_BYTES / n
    assert kept["bytes_index_min"] <= round(index_bytes) <= kept["bytes_index_max"]
    # Tiles are all of the series, one each and a fine one: what is used besides is blocks not yet full.
    assert shard.status().tiles == n * (len(kept["series"]) + 1)
    tiles = sum(s["bytes_per_tile"] + (s["bytes_per_fine_tile"] or 0) for s in kept["series"])
    assert kept["bytes_one_tile"] == kept["bytes_per_row"] + kept["bytes_index_max"] + tiles
    found = int(shard.memory.words[M_USED]) * WORD_BYTES / n
    assert kept["bytes_one_tile"] - 4 <= found <= kept["bytes_one_tile"] * 1.35
    assert kept["bytes_full"] > 10 * kept["bytes_one_tile"]


def test_not_to_a_terminal_the_tables_are_plain_and_whole(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, str(file))
    assert (status, err) == (0, "")
    assert not re.search("[\x1b─━│]", out)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:2] == [
        "spend orders[user] owner retention",
        "feature aggregation over tiles B/entity B/tile overhang",
    ]
    assert "dear_30d Count() where (price > 50) 30d 12h 4 8 12h 1.7 %" in lines
    assert 'exact_1h Sum("price") 1h exact 1m 4 8 + 8/ms 0' in lines
    assert 'last_category Last("category") lifetime, ttl 365d 24 0' in lines
    assert 'dear_share Ratio("dear_30d", "orders_30d") nothing kept' in lines
    assert "large orders[user] where (price > 1000) owner fraud" in lines
    assert "tiles of 12h: 16 bytes, 61 at most where (price > 50)" in lines
    assert any(line.endswith("of index; shared with spend") for line in lines)
    assert "one entity 62 bytes" in lines  # lifetime only


@pytest.mark.parametrize("width", [80, 100, 160])
def test_on_a_terminal_a_table_fits_and_shows_every_column(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("flight_delay", "churn"):
        _, out, _ = run(capsys, str(ROOT / "models" / f"{name}.py"))
        shown = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in out.splitlines()]
        assert max(map(len, shown)) <= width
        heads = [line for line in shown if "overhang" in line]
        assert len(heads) == {"flight_delay": 8, "churn": 1}[name]
        assert all("B/tile" in line for line in heads)
        if width >= 100:
            assert "aggregation" in heads[0]
            assert any('Mean("dep_delay")' in line for line in shown) or name == "churn"


def test_a_file_that_does_not_do_is_an_error_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "none.py") == (
        1, "", "millpond: definition `none.py`: cannot be read: [Errno 2] No such file or directory: 'none.py'\n",
    )  # fmt: skip
    wrong = tmp_path / "wrong.py"
    wrong.write_text(DEFINITION.replace('window="7d"', 'window="7 days"'))
    status, out, err = run(capsys, str(wrong))
    assert (status, out) == (1, "")
    assert err.startswith("millpond: LastN window: expected a length such as ")


def test_lengths_are_written_as_they_are_declared() -> None:
    lengths = {1: "1ms", 10: "10ms", 1_000: "1s", 90_000: "90s", 7_200_000: "2h", 43_200_000: "12h", 604_800_000: "7d"}
    assert {ms: length_text(ms) for ms in lengths} == lengths


# -- the table of the README


def test_a_top_says_its_wider_tiles_and_what_they_take_once_for_values_and_counts(
    capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    file.write_text(
        DEFINITION
        + """
from millpond.feature_actors import TopK, TopKCounts

tops = FeatureView("tops", owner="shop", source=orders, key=["user", "category"], features={
    "prices": TopK("price", k=5, m=20, window="24h"), "counts": TopKCounts("price", k=5, m=20, window="24h"),
    "ever": TopK("category", k=5),
})
"""
    )
    view = described(capsys, file)["tops"]
    prices, counts, ever = view["features"]
    assert (prices["aggregation"], counts["aggregation"]) == (
        'TopK("price", k=5, m=20)', 'TopKCounts("price", k=5, m=20)',
    )  # fmt: skip
    for line in (prices, counts):
        assert (line["tile_width_ms"], line["bytes_per_tile"]) == (7_200_000, 8 + 24 * 20)
        assert line["overhang_percent"] == 8.33
    assert (ever["tile_width_ms"], ever["bytes_per_entity"]) == (None, 8 + 24 * 32)
    (series,) = view["kept"]["series"]
    assert (series["bytes_per_tile"], series["tiles_max"]) == (8 + 8 + 24 * 20, 13)


def test_streaks_and_sessions_say_what_they_are_and_take(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    file.write_text(
        DEFINITION
        + """
from millpond.feature_actors import SessionSeconds, Sessions, Streak, StreakDays

runs = FeatureView("runs", owner="shop", source=orders, key=["user", "category"], features={
    "dear": Streak(of=pc.field("price") > 50, n=10), "days": StreakDays(n=100),
    "visits": Sessions(window="7d"), "length": SessionSeconds(window="7d"),
})
"""
    )
    view = described(capsys, file)["runs"]
    shown = [(f["aggregation"], f["bytes_per_entity"], f["bytes_per_tile"]) for f in view["features"]]
    assert shown == [
        ("Streak(of=(price > 50), n=10)", 88, None),
        ("StreakDays(n=100)", 24, None),
        ('Sessions(gap="30m", n=8)', 4, 152),
        ('SessionSeconds(gap="30m", n=8)', 4, 152),
    ]
    (series,) = view["kept"]["series"]
    assert series["bytes_per_tile"] == 8 + 152


def row_of(kind: type[Aggregation] | type[Derived]) -> str:
    """Return the line of the README's table that an aggregation wants."""
    path = kind.__module__.removeprefix("millpond.").replace(".", "/") + ".py"
    assert kind.__doc__ is not None
    meaning = " ".join(inspect.cleandoc(kind.__doc__).split("\n\n")[0].split())
    memory = "none"
    if issubclass(kind, Aggregation):
        sizes = {"n": " n", "m": " m", "categories": " (categories + 1)"}
        if kind is StreakDays:  # a bit for each
            sizes["n"] = f" ceil(n / {DAYS_PER_WORD})"
        size = "".join(sizes.get(f.name, "") for f in fields(kind))
        head = sum(part.head_words for part in kind.parts)
        memory = f"{WORD_BYTES * sum(part.words for part in kind.parts)}{size}" + (
            f" + {WORD_BYTES * head}" * (head > 0)
        )
    cells = [f"[`{kind.__name__}`]({path})", meaning, f"`{kind.formula}`", kind.empty, kind.error_text, memory]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def test_the_table_of_the_readme_has_a_row_for_each_aggregation() -> None:
    own = [kind for kind in AGGREGATIONS if kind.__module__.startswith("millpond.")]
    wanted = [row_of(kind) for kind in (*own, Ratio, Derived)]
    found = re.findall(
        r"^\| \[`\w+`\]\(feature_actors/aggregations/.*$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(found) == sorted(wanted), "the table wants these rows:\n" + "\n".join(wanted)


def test_the_readme_shows_exact_strings_derived_and_several_columns() -> None:
    """The example of the section, run after those before it, on whose events it goes on."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "readme"}
    # Those of the kit are files of a team's tests; those behind ask a cluster.
    for block in [block for block in blocks if "def test_" not in block][:3]:
        exec(compile(block, "README.md", "exec"), names)
    more = names["more"]
    assert more.texts == {"user_books.last_book": ["b7", "b8"]}
    expected = [[1, 0, 1, 0, 12.5, np.nan], [0, 1, 2, 0.5, 60, 12.5]]
    np.testing.assert_array_equal(more.matrix[:, [0, 1, 2, 3, 5, 6]], expected)
