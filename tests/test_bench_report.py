"""What a run leaves behind: figures beside their bars, a page, a line of the history; how it compares with others."""

from __future__ import annotations

import argparse
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bench import _Fake, _outcome

from millpond.bench import backfill, command, history, mixed, models, parity, score, soak, trainset, users
from millpond.bench import events as events_bench
from millpond.bench import faults as faults_bench
from millpond.bench import recovery as recovery_bench
from millpond.bench.bars import BARS, Bar
from millpond.bench.growth import growth, medians
from millpond.bench.history import compare, earlier_line
from millpond.bench.plots import latency_plot, linear_ticks, log_ticks, rounds_plot, time_plot
from millpond.bench.report import html_page
from millpond.bench.sketches import SketchWorkload
from millpond.bench.store import FULL, meanings
from millpond.bench.workload import Evidence, Series, run_workload
from millpond.cluster.cli import main
from millpond.cluster.config import Config
from millpond.feature_actors.errors import BadRequest, NotFound

MEANINGS = {
    "store": meanings(FULL), "events": events_bench.MEANINGS, "faults": faults_bench.MEANINGS,
    "recovery": recovery_bench.MEANINGS, "score": score.MEANINGS, "models": models.MEANINGS, "users": users.MEANINGS,
    "soak": soak.MEANINGS, "mixed": mixed.MEANINGS, "parity": parity.MEANINGS, "trainset": trainset.MEANINGS,
    "backfill": backfill.MEANINGS, "sketches": SketchWorkload.meanings,
}  # fmt: skip


# -- bars


def test_every_bar_is_of_a_figure_and_every_scenario_has_its_figures() -> None:
    assert set(MEANINGS) == set(command.SCENARIOS)
    for bench, bars in BARS.items():
        assert set(bars) <= set(MEANINGS[bench]), bench


def test_a_value_at_the_bound_holds_unless_it_is_to_be_less() -> None:
    assert [Bar(">=", 0.9).judged(v) for v in (0.9, 0.899)] == [">= 0.9 ok", ">= 0.9 MISSED"]
    assert [Bar("<", 5).judged(v) for v in (4.99, 5)] == ["< 5 ok", "< 5 MISSED"]
    assert str(Bar("<=", 1_000_000)) == "<= 1,000,000"


# -- the history


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "history.jsonl"
    rows = [
        {"bench": "fake", "at": "t1", "commit": "aaa111", "speed_per_s": 10.0},
        {"bench": "other", "at": "t2", "commit": "aaa111", "speed_per_s": 1.0},
        {"bench": "fake", "at": "t3", "commit": "bbb222-dirty", "speed_per_s": 20.0},
        {"bench": "fake", "at": "t4", "commit": "aaa111", "speed_per_s": 30.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_earlier_line_is_found_by_number_commit_or_file(lines: Path, tmp_path: Path) -> None:
    assert [earlier_line("fake", str(n), lines)["at"] for n in (1, 2, 3)] == ["t4", "t3", "t1"]
    assert earlier_line("fake", "bbb", lines)["at"] == "t3"
    assert earlier_line("fake", "aaa111", lines)["at"] == "t4"
    assert earlier_line("other", str(lines), tmp_path / "none")["at"] == "t2"
    output = tmp_path / "out.json"
    output.write_text('{"speed_per_s": 5.0}')  # of --json, which does not name the bench
    assert earlier_line("fake", str(output), lines) == {"speed_per_s": 5.0}


def test_a_line_that_is_not_there_is_refused_before_anything_runs(lines: Path, tmp_path: Path) -> None:
    fake = _Fake([])
    for which, why in (
        ("4", "has 3 lines of bench `fake`; 1 is the last"),
        ("0", "1 is the last"),
        ("ccc", "no line of bench `fake` is of such a commit; the last: `aaa111`, `bbb222-dirty`"),
    ):
        with pytest.raises(NotFound, match=why):
            run_workload(fake, as_json=True, against=which, history=lines)
    broken = tmp_path / "broken"
    broken.write_text("{}\nno JSON\n")
    with pytest.raises(BadRequest, match=r"line 2 of .* is no JSON object"):
        earlier_line("fake", str(broken), lines)
    # It may hold folders already.
    assert fake.calls == ["close"] * 3


def test_what_moved_by_more_than_the_band_is_marked_and_says_which_way() -> None:
    old = {
        "a_per_s": 100, "b_ms": 1.0, "c_ratio": 1.0, "count": 10, "score_vs_noop_ratio": 0.5, "score_cost_us": 100.0,
        "same_ms": 2.0, "lost": 0, "gone_ms": 1.0, "shards": 1, "text": "x",
    }  # fmt: skip
    new = {
        "a_per_s": 131, "b_ms": 1.31, "c_ratio": 1.11, "count": 20, "score_vs_noop_ratio": 0.6, "score_cost_us": 50.0,
        "same_ms": 2.5, "lost": 3, "new_ms": 1.0, "shards": 2, "text": "y",
    }  # fmt: skip
    found = compare("score", old, new)
    verdicts = {name: moved.verdict for name, moved in found.figures.items()}
    assert verdicts == {
        "a_per_s": "better", "b_ms": "worse", "c_ratio": "moved", "count": "moved", "score_vs_noop_ratio": "better",
        "score_cost_us": "better", "same_ms": "", "lost": "moved",
    }  # fmt: skip
    assert found.figures["lost"].ratio is None
    assert found.settings == {"shards": (1, 2)}
    assert compare("score", {"a_per_s": 1.0}, {"shards": 2}).settings == {}  # an older line did not say
    back = compare("score", new, old)
    assert back.figures["a_per_s"].verdict == "worse"
    assert back.figures["a_per_s"].ratio == pytest.approx(1 / 1.31, abs=1e-3)
    within = compare("x", {"a_per_s": 100, "r_ratio": 1.0}, {"a_per_s": 129, "r_ratio": 1.09})
    assert {moved.verdict for moved in within.figures.values()} == {""}


def test_a_run_is_compared_in_json_in_the_table_and_on_the_page_and_recorded_without_it(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run_workload(_Fake([]), as_json=True, record_to=lines, html=page, against="1", history=lines) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["against"]["commit"] == "aaa111"
    assert printed["against"]["figures"] == {
        "speed_per_s": {"old": 30.0, "new": 12.5, "ratio": 0.417, "moved": "worse"}
    }
    assert "against" not in json.loads(lines.read_text().splitlines()[-1])
    assert "0.417" in page.read_text()
    assert run_workload(_Fake([]), as_json=False, against="aaa111", history=lines) == 0
    out = capsys.readouterr().out
    assert re.search(r"speed_per_s.*12\.5.*30\.0.*0\.417.*worse", out.replace("\n", " "))
    assert "1.3 times" in out


def test_the_history_of_the_checkout_stands_in_bench_and_can_be_read() -> None:
    assert Path(__file__).parents[1] / "bench" / "history.jsonl" == history.HISTORY
    assert earlier_line("score", "1", history.HISTORY)["score_32_requests_per_s"] > 0


# -- the command


def _arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(given)


def test_every_scenario_has_a_workload_of_its_name_which_starts_nothing_when_it_is_made(tmp_path: Path) -> None:
    for scenario in (*command.SCENARIOS, *command.ALIASES):
        options = command.options_of(_arguments(scenario, "--quick"))
        workload = command.workload_of(scenario, Config(data_dir=str(tmp_path)), options)
        assert workload.name == command.ALIASES.get(scenario, scenario)
        workload.close()
        assert list(tmp_path.iterdir()) == []


def test_arguments_become_options() -> None:
    options = command.options_of(
        _arguments("score", "--ids", "zipf", "--zipf-exponent", "1.5", "--rate", "300", "--arrivals", "fixed")
    )
    assert (str(options.ids), options.rate, options.arrivals) == ("zipf 1.5", 300.0, "fixed")
    assert command.options_of(_arguments("score", "--quick")).measured_rounds == 1


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["store", "--quick", "--record"], "figures of a --quick run are not recorded"),
        (["store", "--quick", "--against", "no-such-commit"], "no line of bench `store` is of such a commit"),
        (["store", "--seconds", "0"], "--seconds 0; it is more than 0"),
        (["store", "--html", "no-such-folder/page.html"], "there is no folder for it that can be written to"),
        (["store", "--port", "8000"], "--port is each scenario's own"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(given: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *given]) == 1
    assert why in capsys.readouterr().err


# -- growth


def _waves(seed: int, n: int, memory: float = 0.9) -> np.ndarray[Any, Any]:
    """Noise each of whose values is mostly the one before it."""
    draw = np.random.default_rng(seed)
    values = np.zeros(n)
    for i in range(1, n):
        values[i] = memory * values[i - 1] + draw.normal()
    return values


def test_a_line_that_is_added_adds_its_slope_and_no_doubt() -> None:
    times, noise = np.arange(200) / 720, _waves(1, 200)
    one, steeper = growth(times, noise), growth(times, noise + 7.5 * times)
    assert steeper.slope - one.slope == pytest.approx(7.5)
    assert steeper.upper - steeper.slope == pytest.approx(one.upper - one.slope)
    assert one.lower < one.slope < one.upper


def test_the_bound_holds_for_nearly_all_series_although_neighbours_say_the_same() -> None:
    times = np.arange(240) / 720
    held = [growth(times, _waves(seed, 240) + 3.0 * times).upper >= 3.0 for seed in range(300)]
    assert np.mean(held) >= 0.93

    def naive_upper(values: np.ndarray[Any, Any]) -> float:
        x = times - times.mean()
        slope = x @ values / (x @ x)
        rest = values - values.mean() - slope * x
        return float(slope + 1.96 * np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))

    naive = [naive_upper(_waves(seed, 240) + 3.0 * times) >= 3.0 for seed in range(300)]
    assert np.mean(naive) < 0.85


def test_the_error_weighs_every_pair_of_residuals_by_how_near_they_are() -> None:
    times, values = np.arange(60) / 720, _waves(5, 60)
    line = np.polynomial.Polynomial.fit(times, values, 1)
    scores = (times - times.mean()) * (values - line(times))
    nearness = 1 - np.abs(np.subtract.outer(np.arange(60), np.arange(60))) / 60
    error = np.sqrt(scores @ nearness @ scores * 60 / 58) / ((times - times.mean()) ** 2).sum()
    found = growth(times, values)
    assert found.slope == pytest.approx(line.convert().coef[1])
    assert found.upper - found.slope == pytest.approx(5.72 * error)


def test_growth_is_found_and_of_a_few_samples_nothing_is_said() -> None:
    times = np.arange(240) / 720
    assert growth(times, 400 + 60 * times + 0.2 * _waves(3, 240)).lower > 5
    assert growth(times, np.full(240, 400.0)).upper == 0
    assert np.isnan(growth([0, 1], [1, 2]).upper)


def test_what_comes_for_some_seconds_is_no_growth_and_what_stays_is() -> None:
    draw = np.random.default_rng(7)
    times = np.arange(1_200) / 3_600
    memory = 150 + 0.1 * draw.normal(size=1_200)
    spiky = memory.copy()
    for at in (610, 800, 1_000, 1_180):  # all of them in the second half
        spiky[at : at + 6] += 55
    assert growth(times, spiky).upper > 5
    assert abs(growth(*medians(times, spiky, 20)).upper) < 1
    leaking = spiky + 6 * times
    assert 5 < growth(*medians(times, leaking, 20)).lower < growth(*medians(times, leaking, 20)).upper < 7


def test_medians_are_of_spans_of_equal_length_and_empty_ones_are_left_out() -> None:
    assert medians([0, 1, 1.5, 9, 10], [1, 3, 2, 7, 9], 5) == ([1.0, 9.0], [2.0, 8.0])
    assert medians([0, 1, 2, 3], [4, 1, 2, 3], 1) == ([1.5], [2.5])


# -- plots and the page


def _lines(svg: str) -> list[list[tuple[float, float]]]:
    root = ET.fromstring(svg)
    return [
        [tuple(map(float, point.split(","))) for point in (line.get("points") or "").split()]  # type: ignore[misc]
        for line in root.iter("polyline")
    ]


def test_latencies_never_fall_over_the_shares_and_end_at_the_largest() -> None:
    draw = np.random.default_rng(0)
    fast = draw.lognormal(0, 1, 5_000).tolist()
    one, other = _lines(latency_plot("t", {"fast": fast, "slow": [x * 10 for x in fast]}))
    for line in (one, other):
        xs, ys = zip(*line, strict=True)
        assert list(xs) == sorted(xs)
        assert list(ys) == sorted(ys, reverse=True)  # up is less in SVG
        assert 0 <= min(xs) <= max(xs) <= 560
        assert 0 <= min(ys) <= max(ys) <= 300
    # Ten times as slow is as much higher everywhere, on a logarithmic scale.
    steps = {round(a[1] - b[1]) for a, b in zip(one, other, strict=True)}
    assert max(steps) - min(steps) <= 1


def test_plots_of_one_value_of_a_constant_and_of_names_that_are_markup_are_drawn() -> None:
    for svg in (
        latency_plot("a < b & c", {"one": [3.0]}),
        rounds_plot("t", {"zero": [0.0, 0.0], "other": [0.0]}, "requests/s"),
        time_plot("t", [0.0], [5.0], "MB"),
        time_plot("t", [0.0, 60.0, 120.0], [0.0, 0.0, 0.0], "MB", 0.0),
    ):
        assert all(0 <= x <= 560 and 0 <= y <= 300 for line in _lines(svg) for x, y in line)


def test_ticks_are_round_numbers_within_bounds() -> None:
    for low, high in ((0.0, 7.3), (412.1, 413.9), (0.0, 120_000.0)):
        ticks = [at for at, _ in linear_ticks(low, high)]
        assert 3 <= len(ticks) <= 7
        assert low <= min(ticks) <= max(ticks) <= high
    assert [text for _, text in log_ticks(0.05, 12_000)] == ["0.1", "1", "10", "100", "1,000", "10,000"]


class _Shown(_Fake):
    """Draws everything."""

    meanings = {"speed_per_s": "how <fast> & far", "score_cost_us": ""}
    name = "score"

    def metrics(self) -> dict[str, Any]:
        return {"speed_per_s": 12.5, "score_cost_us": 30.0, "shards": 2}

    @property
    def evidence(self) -> Evidence:
        outcomes = {name: [_outcome(50, 1.5), _outcome(60, 2.5)] for name in ("a", "b", *(f"x{i}" for i in range(9)))}
        series = {"Memory": Series([0.0, 60.0, 120.0], [5.0, 6.0, 5.5], "MB", 15.0)}
        return Evidence(outcomes, {"together": ["a", "b"], "never measured": ["none"]}, series)


def test_the_page_needs_nothing_but_itself_and_has_every_figure_bar_and_plot() -> None:
    shown = _Shown([])
    page = html_page(shown, {**shown.metrics(), "commit": "abc"}, ["scores <add> up"], None)
    for text in ("speed_per_s", "12.5", "how &lt;fast&gt; &amp; far", "scores &lt;add&gt; up", "bar &lt;= 25: missed"):
        assert text in page
    assert "<fast>" not in page
    assert not re.search(r"https?://|src=|url\(|@import|<link|<script", page)
    plots = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    titles = [re.search(r"<figcaption>(.*?)</figcaption>", plot)[1] for plot in plots]  # type: ignore[index]
    assert titles == [
        "Latency: together", "Requests a second, by round: together",
        "Latency: others", "Requests a second, by round: others",
        "Latency: others, 2", "Requests a second, by round: others, 2", "Memory",
    ]  # fmt: skip
    for plot in plots:
        for svg in re.findall(r"<svg.*?</svg>", plot, re.DOTALL):
            ET.fromstring(svg)
    assert "+15.00 MB/h" in page
    assert "prefers-color-scheme: dark" in page
