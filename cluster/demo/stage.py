"""What the demos have in common: a cluster under load, progress on the screen, figures at the end."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from millpond.cluster.cluster import Cluster
from millpond.cluster.config import Config
from millpond.cluster.demo.session import ARROW_STREAM, Session, arrow_stream
from millpond.feature_actors.aggregations import Aggregation
from millpond.feature_actors.errors import BadRequest, DeclarationError, Unavailable
from millpond.feature_actors.layout import compile_layout
from millpond.feature_actors.manifest import begin_anew, lock_directory
from millpond.feature_actors.oracle import agrees, known
from millpond.feature_actors.plan import FeatureRows
from millpond.feature_actors.view import Feature, FeatureView
from millpond.models.definition import Definition
from millpond.models.model import LoadedModel, Model

__all__ = ["Stage", "epoch_ms", "instants", "judge", "keep_serving", "offline_model", "parity", "sample"]

BATCH_ROWS = 20_000


class Stage:
    """The run of a demo: steps with a bar each on standard error, figures collected on the way."""

    def __init__(self, config: Config, origins: Mapping[str, str], name: str) -> None:
        if origins["name"] == "default":
            config = replace(config, name=name)
        if origins["clock"].startswith("flag"):
            raise BadRequest("demo: time is the events' in each of them; leave --clock out")
        #: Time is the events': a replay of 2013 behaves as 2013 did.
        self.config = replace(config, clock="event")
        self.figures: dict[str, Any] = {}
        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:28}"),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self._begun = time.perf_counter()

    @property
    def artifacts_dir(self) -> Path:
        path = self.config.directory / "demo"
        path.mkdir(parents=True, exist_ok=True)
        for folder in (path, self.config.directory):
            folder.chmod(0o700)
        return path

    def __enter__(self) -> Stage:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    @contextmanager
    def step(self, what: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        """Show a bar while the body runs; it calls `advance(n, note)`."""
        task: TaskID = self._progress.add_task(what, total=total, note="")

        def advance(n: float = 0, note: str | None = None) -> None:
            self._progress.advance(task, n)
            if note is not None:
                self._progress.update(task, note=note)

        yield advance
        done = self._progress.tasks[task].completed if total else 1
        self._progress.update(task, total=done or 1, completed=done or 1)

    def cluster(self, definition_file: Path) -> tuple[Cluster, Definition]:
        """Start a cluster with a definition's sources and views; its models come later."""
        definition = Definition.read(definition_file, self.artifacts_dir)
        self._begin_anew()
        return Cluster(self.config, [definition]).start(models=False), definition

    def _begin_anew(self) -> None:
        """Take away what an earlier demo has logged in this directory, and nothing else's."""
        logs, mark = list(self.config.directory.glob("shards/*/log")), self.artifacts_dir / "logs_are_of_the_demo"
        if logs and not mark.exists():
            raise DeclarationError(
                f"demo: `{self.config.directory}` holds events of a cluster; name another with `--name`"
            )
        if mark.exists():
            lock = lock_directory(self.config.directory, self.config.name)
            begin_anew(self.config.directory)
            lock.release()
        mark.touch()

    def load(self, url: str, events: Mapping[str, pa.Table], advance: Callable[..., None]) -> None:
        """Post events in bulk, as Arrow streams, a connection for each source, and note events/s.

        A source's batches go one after the other, so that its events arrive in their order.
        """
        bodies = {
            source: [arrow_stream(table.slice(at, BATCH_ROWS)) for at in range(0, len(table), BATCH_ROWS)]
            for source, table in events.items()
        }
        sessions = {source: Session(url) for source in events}
        start, sent = time.perf_counter(), 0

        def send(source: str) -> None:
            nonlocal sent
            for number, body in enumerate(bodies[source]):
                sessions[source].post(f"/v1/events/{source}", body, ARROW_STREAM)
                rows = min(BATCH_ROWS, len(events[source]) - number * BATCH_ROWS)
                sent += rows
                advance(rows, f"{sent / (time.perf_counter() - start):,.0f} events/s")

        with ThreadPoolExecutor(len(events)) as pool:
            list(pool.map(send, events))
        seconds = time.perf_counter() - start
        self.count("events", sent)
        self.figures["events_per_s"] = round(sent / seconds)
        for session in sessions.values():
            self.add_requests(session)

    def count(self, name: str, n: int) -> None:
        self.figures[name] = self.figures.get(name, 0) + n

    def add_requests(self, session: Session) -> None:
        """Take over a session's failures and close it."""
        self.count("failed_requests", session.failed)
        if session.first_failure:
            self.console.print(f"[red]a request failed:[/red] {session.first_failure}", highlight=False)
        session.close()

    def finish(self, as_json: bool, meanings: Mapping[str, str], seed: int) -> int:
        """Print the figures; return 0 if nothing failed and every score was found again, else 1."""
        figures = self.figures
        figures |= {
            "seconds": round(time.perf_counter() - self._begun, 1),
            "seed": seed,
            "commit": _commit(),
            "machine": {
                "cores": os.cpu_count(),
                "memory_gb": round(_memory_bytes() / 1e9, 1),
                "arch": platform.machine(),
            },
        }
        wrong = [
            f"{name} = {figures[name]}, expected {figures[want] if want else 0}"
            for name, want in (
                ("failed_requests", None), ("parity_equal", "parity_total"), ("oracle_equal", "oracle_total"),
            )
            if figures[name] != (figures[want] if want else 0)
        ]  # fmt: skip
        if as_json:
            Console(soft_wrap=True).print_json(msgspec.json.encode(figures).decode(), indent=None)
        else:
            table = Table("figure", "value", "meaning", title="Millpond demo", title_justify="left")
            for name, meaning in meanings.items():
                value = figures[name]
                table.add_row(name, f"{value:,}" if isinstance(value, (int, float)) else str(value), meaning)
            Console().print(table)
        for line in wrong:
            self.console.print(f"[red]wrong:[/red] {line}", highlight=False)
        return 1 if wrong else 0


def epoch_ms(table: pa.Table, column: str) -> npt.NDArray[np.int64]:
    """Return a timestamp column as milliseconds, int64 [n]."""
    return table[column].combine_chunks().cast(pa.int64()).to_numpy()  # type: ignore[no-any-return]


def instants(table: pa.Table, column: str) -> npt.NDArray[np.datetime64]:
    """Return a timestamp column as datetime64[ms] [n]."""
    return epoch_ms(table, column).view("datetime64[ms]")


def parity(
    answers: Sequence[Mapping[str, Any] | None], model: Model, offline: FeatureRows, results: Sequence[Any]
) -> int:
    """Count the live answers that equal the training set bit for bit: features, result, as-of, unknown views.

    answers: of requests with `?features=true`, in the order of `offline`'s rows; None for one that
    failed.
    """
    equal = 0
    as_of = np.array(offline.as_of, "datetime64[ms]").astype(str).tolist()
    names = [f.full_name for f in model.features]
    for row, (answer, want, result) in enumerate(zip(answers, offline.matrix, results, strict=True)):
        if answer is None:
            continue
        given = [answer["features"][n] for n in names]
        flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
        got = np.array([np.nan if one is None else one for one in flat], np.float64)
        equal += (
            answer["result"] == result
            and answer["as_of"] == f"{as_of[row]}Z"
            and answer["unknown"] == offline.unknown[row]
            # NaN has many bit patterns and JSON one word for all of them; everything else is told apart.
            and np.where(np.isnan(got), np.nan, got).tobytes() == np.where(np.isnan(want), np.nan, want).tobytes()
        )
    return equal


def judge(
    views: Sequence[FeatureView],
    events: Mapping[str, pa.Table],
    rows: Sequence[tuple[Mapping[str, Any], int, Mapping[str, Any], Sequence[str]]],
    advance: Callable[..., None],
) -> int:
    """Count the rows of which the oracle, from the raw events, agrees with every feature.

    rows: (key fields, as-of in ms, features by full name, unknown views).
    """
    logs = {}
    for view in views:
        # Only what the rows can see is unpacked, by time and by the first field of the key.
        table = events[view.source.name]
        table = table.filter(pc.is_in(table[view.key[0]], pa.array({key[view.key[0]] for key, _, _, _ in rows})))
        times = epoch_ms(table, view.source.event_time)
        seen = [_reach((times, range(len(times))), row[1], _kept(*view)) for row in rows]
        first, stop = min(r.start for r in seen), max(r.stop for r in seen)
        logs[view.name] = _by_key(view, table.slice(first, stop - first))
    agreed = 0
    for key_fields, as_of_ms, features, unknown in rows:
        right = True
        for view in views:
            key = tuple(key_fields[k] for k in view.key)
            log = logs[view.name].get(key, ([], []))
            right &= known(view, _reach(log, as_of_ms, _kept(*view)), key, as_of_ms) == (view.name not in unknown)
            given = {f.name: features[f.full_name] for f in view if f.full_name in features}
            given = {name: np.nan if value is None else value for name, value in given.items()}
            for name, got in given.items():
                seen = _reach(log, as_of_ms, _kept(view[name]))
                right &= agrees(view, name, seen, key, as_of_ms, got, given)
        agreed += right
        advance(1)
    return agreed


_Log = tuple[Sequence[int], Sequence[dict[str, Any]]]


def _by_key(view: FeatureView, table: pa.Table) -> Mapping[tuple[Any, ...], _Log]:
    """Return times and events of each entity, in time order."""
    time_field = view.source.event_time
    names = [n for n in table.column_names if n in {*view.key, time_field, *view.reads}]
    logs: dict[tuple[Any, ...], tuple[list[int], list[dict[str, Any]]]] = {}
    for time_ms, event in zip(epoch_ms(table, time_field).tolist(), table.select(names).to_pylist(), strict=True):
        times, log = logs.setdefault(tuple(event[k] for k in view.key), ([], []))
        times.append(time_ms)
        log.append({**event, time_field: time_ms})
    return logs


def _kept(*features: Feature) -> list[Aggregation]:
    """Return the aggregations of features: their own, or those of the features that they are derived from."""
    return [a for f in features for a in ([f.kept] if f.derived is None else _kept(*f.of))]


def _reach(log: tuple[Any, Any], as_of_ms: int, aggregations: Sequence[Aggregation]) -> Any:
    """Cut a log to what could be seen as of a time, with a tile to spare: the oracle looks at every event."""
    times, events = log
    stop = bisect_right(times, as_of_ms)
    windows = [a.window_ms for a in aggregations]
    if None in windows:
        return events[:stop]
    longest, wide = max(w or 0 for w in windows), max(a.tile_width_ms or 0 for a in aggregations)
    return events[bisect_left(times, as_of_ms - longest - wide) : stop]


def keep_serving(stage: Stage, cluster: Cluster, model: str, key: Mapping[str, Any]) -> None:
    """Leave the cluster running until Ctrl-C, with a line to try it."""
    stage.__exit__()
    body = msgspec.json.encode(key).decode()
    stage.console.print(f"\nserving at {cluster.url} until Ctrl-C; try:\n", highlight=False)
    url = f"{cluster.url}/v1/score/{model}?features=true"
    line = f"curl -s '{url}' -H 'content-type: application/json' -d '{body}'\n"
    stage.console.print(line, highlight=False, soft_wrap=True, markup=False)
    cluster.wait()


def offline_model(stage: Stage, model: Model) -> LoadedModel:
    """Load a model from the artifacts that the demo trained, outside any cluster."""
    views = {f.view.name: f.view for f in (*model.features, *model.reads)}
    return LoadedModel(model, compile_layout([], views.values()), stage.artifacts_dir)


def sample(n: int, size: int, seed: int) -> list[int]:
    """Return `size` of the numbers below n, ascending, drawn with a seed."""
    drawn = np.random.default_rng(seed).choice(n, min(size, n), replace=False)
    return sorted(drawn.tolist())


def check_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise Unavailable(
            "the demo trains with scikit-learn, which is not installed; run: pip install scikit-learn==1.9.1"
        ) from None


def _commit() -> str:
    """Return the commit of the checkout that this runs from, or the version that is installed."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"v{version('millpond')}"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
