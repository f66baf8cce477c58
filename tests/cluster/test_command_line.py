# ruff: noqa: E501  (messages stand whole)
"""The story of a cluster that is started from a terminal: two definition files, Serve's own proxy, a shard killed,
`millpond down`; then again on the same data directory, on HAProxy: a day of flights with every score equal to the
training set's, and Ctrl-C.

The tests stand in the order of the story. The last of the first run ends it, and the second needs that.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apps import DEFINITION, purchase
from processes import processes_of, shard_pids, shelter_of
from served_contract import START, Served, ServedContract
from terminal import MILLPOND, Up, run, until

from millpond.cluster.demo.flights import Flights, load_flights
from millpond.models import flight_delay as example
from millpond.models.training import Threads, training_set

DAY, NEXT = "2013-03-05", "2013-03-06"
KEY = ("tailnum", "carrier", "origin", "dest")


@pytest.fixture(scope="module")
def flights() -> Flights:
    return load_flights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, flights: Flights) -> Path:
    """A working directory with a definition, a configuration and a trained model."""
    from threadpoolctl import threadpool_limits

    folder = tmp_path_factory.mktemp("terminal")
    (folder / "apps.py").write_text(DEFINITION)
    (folder / "millpond.toml").write_text(
        'name = "told"\nport = 0\nshards = 2\nclock = "event"\ndraining_period_s = 0\nscore_log_share = 1.0\n'
        "score_log_flush_s = 3_600.0\n"  # what is logged is written at a clean stop
    )
    (folder / "trained").mkdir()
    past = flights.between("2013-02-01", DAY)
    rows = training_set(
        example.flight_delay.features, past.labels, {"departures": past.departures, "arrivals": past.arrivals}
    )
    with threadpool_limits(1, user_api="openmp"):
        example.train(
            rows.matrix[-6_000:], past.labels["late"].to_numpy()[-6_000:], str(folder / "trained" / "flight_delay.npz")
        )
    return folder


def minutes(table: Any, column: str) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for event in table.set_column(table.column_names.index(column), column, table[column].cast("int64")).to_pylist():
        found.setdefault(event[column], []).append(event)
    return found


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[Up]:
    up = Up(folder, "apps.py", str(Path(example.__file__)), "--artifacts", "trained", "--proxy", "serve")
    yield up
    up.end()


@pytest.fixture(scope="module")
def served(up: Up, folder: Path) -> Served:
    return Served(up.url, folder / ".millpond" / "told")


class TestUpOnServesProxy(ServedContract):
    def test_up_says_what_it_serves(self, up: Up, folder: Path) -> None:
        # (What follows the first line is read when it ends; see below.)
        assert (
            (folder / "stderr.txt").read_text().startswith(f"starting cluster `told` in {folder}/.millpond/told ...\n")
        )

    def test_it_is_serves_own_proxy_that_answers(self, served: Served) -> None:
        commands = processes_of(shelter_of(served.directory)).values()
        assert any(c.startswith("ray::ProxyActor") for c in commands)
        assert not any("haproxy" in c.lower() for c in commands)

    def test_status_shows_what_the_cluster_holds(self, up: Up, folder: Path) -> None:
        done = run(folder, "status", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        status = json.loads(done.stdout)
        assert (status["name"], status["url"], status["pid"]) == ("told", up.url, up.process.pid)
        assert {m["model"] for m in status["models"]} == {"churn", "offer", "flight_delay"}
        assert len(status["shards"]) == 2
        held = sum(s["events"]["purchases[user_id]"] for s in status["shards"])
        assert held > 500
        done = run(folder, "status")
        assert (done.returncode, done.stderr) == (0, "")
        for word in ("told", up.url, "flight_delay", "purchases[user_id]", "departures[origin,dest]", f"{held:,}"):
            assert word in done.stdout.replace(", ", ","), done.stdout

    def test_a_second_up_on_the_same_data_is_refused_and_names_the_first(
        self, up: Up, folder: Path, served: Served
    ) -> None:
        done = run(folder, "up", "apps.py")
        message = (
            rf"millpond: cluster `told` runs on {served.directory} already, at {up.url} \(process {up.process.pid}, since "
            r"[-0-9]+ [:0-9]+ UTC\); stop it with `millpond down`, or give this one another name"
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(message, done.stderr.splitlines()[-1]), done.stderr
        assert served.call("GET", "/readyz")[0] == 200
        assert run(folder, "status").returncode == 0  # the first is still known to be there

    def test_a_killed_shard_recovers_what_it_had_acknowledged_and_is_read_meanwhile(self, served: Served) -> None:
        users = range(5_000_000, 5_000_060)
        at = START + 365 * 86_400_000
        served.post_events([purchase(f"kill-{u}", u, 3.0, at, book_id="kill") for u in users])
        victim = min(shard_pids(shelter_of(served.directory)))
        os.kill(victim, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{victim}").exists(), "the end of the shard")

        def read(orders: float) -> None:
            for user in users:
                status, _, answer = served.call("POST", "/v1/score/churn?features=true", {"user_id": user})
                assert (status, answer["features"]["user_spend.orders_30d"]) == (200, orders), answer

        events = [purchase(f"again-{u}", u, 1.0, at) for u in users]

        def taken() -> bool:
            """Send the same events again and again; part of them may be taken by the shard that lives."""
            status, headers, answer = served.call("POST", "/v1/events/purchases", events)
            if status == 200:
                return True
            assert (status, int(headers["retry-after"]) >= 1) == (503, True), answer
            assert answer["error"]["code"] in ("recovering", "unavailable"), answer
            return False

        read(1.0)
        until(taken, "the shard to recover")
        read(2.0)
        assert served.call("GET", "/readyz")[0] == 200
        ack = served.post_events([purchase(f"kill-{u}", u, 3.0, at, book_id="kill") for u in users])
        assert (ack["accepted"], ack["duplicates"]) == (0, len(users))
        read(2.0)

    def test_a_shard_whose_disk_is_away_does_not_begin_empty_and_goes_on_when_it_is_back(self, served: Served) -> None:
        folder = served.directory / "shards" / "000"
        aside = folder.with_name("aside")
        (victim,) = {json.loads((folder / "lock").read_text())["pid"]} & set(shard_pids(shelter_of(served.directory)))
        users = range(5_000_000, 5_000_060)
        events = [purchase(f"away-{u}", u, 1.0, START + 365 * 86_400_000) for u in users]
        folder.rename(aside)
        try:
            os.kill(victim, signal.SIGKILL)
            until(lambda: not Path(f"/proc/{victim}").exists(), "the end of the shard")
            logs = shelter_of(served.directory) / "r" / "session_latest" / "logs"

            def tries() -> int:
                found = 0
                for log in logs.glob("worker-*.err"):
                    with suppress(FileNotFoundError):  # Ray gives the file of a worker another name when it has work
                        found += "shard 0 cannot be opened" in log.read_text()
                return found

            until(lambda: tries() >= 2, "the shard to be tried again")
            assert served.call("POST", "/v1/events/purchases", events)[0] == 503
            assert not folder.exists()
            for user in users:  # with the memory that it left
                assert served.score("churn", {"user_id": user})["features"]["user_spend.orders_30d"] >= 2.0
        finally:
            aside.rename(folder)
        until(lambda: served.call("POST", "/v1/events/purchases", events)[0] == 200, "the shard to recover")
        for user in users:
            assert served.score("churn", {"user_id": user})["features"]["user_spend.orders_30d"] == 3.0

    def test_down_stops_it_and_nothing_is_left(self, up: Up, folder: Path, served: Served) -> None:
        shelter = shelter_of(served.directory)
        done = run(folder, "down")
        assert (done.returncode, done.stdout, done.stderr) == (0, "cluster `told` has stopped\n", "")
        assert up.wait() == 0
        assert sorted(up.said[1:]) == sorted(
            [
                *(f"  POST /v1/events/{s}\n" for s in ("purchases", "departures", "arrivals")),
                *(f"  POST /v1/score/{m}\n" for m in ("churn", "offer", "flight_delay")),
            ]
        )
        assert (processes_of(shelter), shelter.exists()) == ({}, False)
        for command in ("status", "down"):
            done = run(folder, command)
            message = f"millpond: no cluster `told` runs on {served.directory}; start one with `millpond up`\n"
            assert (done.returncode, done.stdout, done.stderr) == (1, "", message)

    def test_what_was_served_until_the_stop_is_logged_and_verified(self, up: Up, folder: Path) -> None:
        assert up.process.poll() == 0
        done = run(folder, "verify", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert (found["scores"]["different"], found["why_missing"]) == (0, {})
        # Of the users of the killed shard alone: before, while it was away, and after.
        assert found["models"]["churn@3"]["equal"] >= 3 * 60


@pytest.fixture(scope="module")
def replayed(up: Up, folder: Path) -> Iterator[Up]:
    """Another cluster, with a data directory of its own: the clock of the first is at its newest event."""
    assert up.process.poll() == 0, "the first run has been stopped"
    up = Up(
        folder, "apps.py", str(Path(example.__file__)), "--artifacts", "trained", "--proxy", "haproxy", "--name", "replay",
        "--score-log-flush-s", "0.1",
    )  # fmt: skip
    yield up
    up.end()


@pytest.fixture(scope="module")
def up_again(up: Up, folder: Path) -> Iterator[Up]:
    """A second run on the data directory of the first, which is over."""
    assert up.process.poll() == 0, "the first run has been stopped"
    up = Up(folder, "apps.py", str(Path(example.__file__)), "--artifacts", "trained", "--proxy", "haproxy")
    yield up
    up.end()


@pytest.fixture(scope="module")
def day_answers(replayed: Up, flights: Flights) -> list[dict[str, Any]]:
    """The answers of a replayed day, one per departure. Before all else: the cluster's clock is that of its events."""
    from millpond.cluster.demo.session import ARROW_STREAM, Session, arrow_stream

    past, day = flights.between("2013-02-01", DAY), flights.between(DAY, NEXT)
    session = Session(replayed.url)
    for source, table in (("departures", past.departures), ("arrivals", past.arrivals)):
        for at in range(0, len(table), 10_000):
            part = table.slice(at, 10_000)
            ack = session.post(f"/v1/events/{source}", arrow_stream(part), ARROW_STREAM)
            assert ack["accepted"] == len(part)
    departures, arrivals = minutes(day.departures, "departed_at"), minutes(day.arrivals, "arrived_at")
    answers = []
    for minute in sorted(departures.keys() | arrivals.keys()):
        for source, events in (("departures", departures.get(minute)), ("arrivals", arrivals.get(minute))):
            if events:
                assert session.post_events(source, events)["accepted"] == len(events)
        for flight in departures.get(minute, ()):
            key = {name: flight[name] for name in KEY}
            answer, _ = session.timed_score("flight_delay", key, f"?as_of={minute}&features=true")
            answers.append(answer)
    assert (session.failed, session.first_failure) == (0, None)
    session.close()
    return answers


class TestUpAgain:
    def test_a_day_of_flights_is_scored_as_the_training_set_says(
        self, day_answers: list[dict[str, Any]], folder: Path, flights: Flights
    ) -> None:
        from millpond.cluster.demo.stage import parity
        from millpond.feature_actors.layout import compile_layout
        from millpond.models.model import LoadedModel

        answers, day = day_answers, flights.between(DAY, NEXT)
        until_next = flights.between("2013-02-01", NEXT)
        labels = day.departures.select(KEY).append_column("as_of", day.departures["departed_at"])
        offline = training_set(
            example.flight_delay.features,
            labels,
            {"departures": until_next.departures, "arrivals": until_next.arrivals},
            workers=Threads(5),
        )
        views = {f.view.name: f.view for f in example.flight_delay.features}.values()
        model = LoadedModel(example.flight_delay, compile_layout([], views), folder / "trained")
        results = model.predict(offline)
        assert len(answers) == len(day.departures) > 800
        assert parity(answers, example.flight_delay, offline, results) == len(answers)
        # The comparison compares something: most features are there, and the scores differ.
        assert np.isfinite(offline.matrix).mean() > 0.9
        assert np.std(results) > 0.01
        tampered = [{**answers[0], "result": np.nextafter(answers[0]["result"], 1)}, *answers[1:]]
        assert parity(tampered, example.flight_delay, offline, results) == len(answers) - 1

    def test_every_score_of_the_day_is_verified_while_the_cluster_runs(
        self, day_answers: list[dict[str, Any]], folder: Path
    ) -> None:
        n = len(day_answers)

        def logged() -> bool:
            return json.loads(run(folder, "status", "--json", "--name", "replay").stdout)["score_log"]["written"] == n

        until(logged, "the scores to be logged")
        done = run(folder, "verify", "--json", "--name", "replay")
        assert (done.returncode, done.stderr) == (0, "")
        found = json.loads(done.stdout)
        assert found["scores"] == {"equal": n, "different": 0, "missing": 0}
        assert set(found["views"]) == {f.view.name for f in example.flight_delay.features}
        assert {counts["equal"] for counts in found["views"].values()} == {n}

    def test_the_same_data_directory_opens_again(self, up_again: Up, folder: Path) -> None:
        directory = folder / ".millpond" / "told"
        manifest, token = (directory / "manifest.json").read_text(), (directory / "admin_token").read_text()
        assert (json.loads(manifest)["cluster_name"], len(token) >= 43) == ("told", True)
        for shard in range(2):
            epoch = json.loads((directory / "shards" / f"{shard:03d}" / "epoch.json").read_text())["epoch"]
            # Once by each run, and once more each time that it was killed.
            assert 2 <= epoch <= 4
        served = Served(up_again.url, directory)
        served.post_events(purchase("again", 1, 2.0, START))
        assert served.score("churn", {"user_id": 1})["unknown"] == []
        # What the first run had acknowledged is there again, and its events are still known.
        for user in (5_000_000, 5_000_059):
            answer = served.score("churn", {"user_id": user})
            assert (answer["unknown"], answer["features"]["user_spend.orders_30d"]) == ([], 3.0)
        at = START + 365 * 86_400_000
        ack = served.post_events(
            [purchase(f"kill-{u}", u, 3.0, at, book_id="kill") for u in range(5_000_000, 5_000_060)]
        )
        assert (ack["accepted"], ack["duplicates"]) == (0, 60)

    def test_ctrl_c_ends_it_cleanly(self, up_again: Up, folder: Path) -> None:
        directory = folder / ".millpond" / "told"
        before = {name: (directory / name).read_text() for name in ("manifest.json", "admin_token")}
        shelter = shelter_of(directory)
        # Ctrl-C goes to every process of the terminal's foreground group.
        os.killpg(up_again.process.pid, signal.SIGINT)
        until(lambda: "stopping" in (folder / "stderr.txt").read_text(), "the stop to begin")
        os.killpg(up_again.process.pid, signal.SIGINT)  # impatience breaks nothing off that is to be cleared away
        assert up_again.wait() == 0
        assert (processes_of(shelter), shelter.exists()) == ({}, False)
        assert not (directory / "cluster.json").exists()
        assert {name: (directory / name).read_text() for name in before} == before
        assert "Traceback" not in (folder / "stderr.txt").read_text()

    def test_another_number_of_slots_is_refused_before_anything_starts(self, folder: Path) -> None:
        done = run(folder, "up", "apps.py", "--slots", "32")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(
            "has n_slots 256, the configuration says 32; it is fixed when the directory is made"
        )

    def test_a_state_file_of_a_dead_process_is_no_cluster(self, folder: Path) -> None:
        """Not even if another process has its number since."""
        state = folder / ".millpond" / "told" / "cluster.json"
        for content in (
            {"pid": os.getpid(), "started_ticks": 1, "url": "http://x", "name": "told"},
            {"pid": 2**22, "started_ticks": 1},
            [],
            {},
        ):
            state.write_text(json.dumps(content))
            assert run(folder, "down").returncode == 1
        state.unlink()


class TestStartsThatAreRefused:
    def test_of_two_that_start_at_once_one_is_refused_and_names_the_other(self, folder: Path) -> None:
        ups = [
            subprocess.Popen(
                [*MILLPOND, "up", "apps.py", "--name", "twice"], cwd=folder, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, start_new_session=True,
            )
            for _ in range(2)
        ]  # fmt: skip
        try:
            until(lambda: any(up.poll() is not None for up in ups), "one of two to be refused")
            (refused,) = (up for up in ups if up.poll() is not None)
            (first,) = (up for up in ups if up is not refused)
            message = (
                rf"millpond: cluster `twice` is starting on {folder}/.millpond/twice just now \(process {first.pid}, since "
                r"[-0-9]+ [:0-9]+ UTC\); wait for it, end that process, or give this one another name"
            )
            said = refused.communicate()[1].splitlines()[-1]
            assert (refused.returncode, bool(re.fullmatch(message, said))) == (1, True), said
            assert first.poll() is None
        finally:
            for up in ups:
                up.terminate()
                up.communicate(timeout=60)
        assert not (folder / ".millpond" / "twice" / "lock").exists()

    def test_a_shard_that_outlived_its_killed_cluster_is_named(self, up_again: Up, folder: Path) -> None:
        assert up_again.process.poll() is not None, "the second run has been stopped"
        shard = folder / ".millpond" / "told" / "shards" / "001"
        held = (
            "import pathlib, sys; from millpond.feature_actors.manifest import lock_shard\n"
            "lock = lock_shard(pathlib.Path(sys.argv[1]), 1, 'told', logged=True)\n"
            "print('held', flush=True); sys.stdin.read()"
        )
        survivor = subprocess.Popen(
            [sys.executable, "-c", held, str(shard.parent.parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
        try:
            assert survivor.stdout is not None
            assert survivor.stdout.readline() == "held\n"
            done = run(folder, "up", "apps.py")
            message = (
                f"millpond: shard 001: `{shard}` is still in use by cluster `told` (process {survivor.pid}, since "
            )
            assert (done.returncode, done.stdout, done.stderr.splitlines()[-1][: len(message)]) == (1, "", message)
        finally:
            survivor.kill()
            survivor.communicate()

    def test_a_field_of_another_type_is_a_new_source(self, folder: Path) -> None:
        (folder / "other.py").write_text(DEFINITION.replace('"price": "float64"', '"price": "int64"'))
        done = run(folder, "up", "other.py")
        message = "millpond: source `purchases`: field `price` was `float64` and is `int64`; that is a new source: give it another name"
        assert (done.returncode, done.stderr.splitlines()[-1]) == (1, message)
