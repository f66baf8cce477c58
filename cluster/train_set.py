"""What `millpond train-set` does: labels in, the same with features beside out, with a bar while it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from millpond.cluster.config import Config
from millpond.cluster.ray_workers import OWN, WORKERS_MAX, RayWorkers, connected
from millpond.feature_actors.errors import BadRequest, NotFound, did_you_mean
from millpond.feature_actors.past import Past
from millpond.models.definition import Definition
from millpond.models.model import Model
from millpond.models.training.events import Knowledge
from millpond.models.training.making import EventsOf, Stage, write_training_set
from millpond.models.training.making import Progress as Told
from millpond.models.training.workers import Threads, Workers

__all__ = ["events_of", "make_training_set", "summary"]

#: Of workers beside what serves, which comes first.
_NICE = 19


def make_training_set(
    config: Config,
    path: Path,
    *,
    model: str | None,
    labels: Path,
    out: Path,
    events: Sequence[str] = (),
    as_of: str = "as_of",
    knowledge: Knowledge = "event-time",
    incomplete: bool = False,
    threads: int | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """Write the training set of a model of a definition file; return where it comes from, see `provenance`.

    events: `SOURCE=FILE` for each source, or none for the events of the cluster that `config` names. ray: the cluster
    whose workers compute it, see `ray_workers.connected`, or None for threads of this process. The others, and what is
    raised, as of `write_training_set`.
    """
    if threads is not None and not 1 <= threads <= WORKERS_MAX:
        raise BadRequest(f"--threads: got {threads}; allowed is 1 to {WORKERS_MAX}")
    definition = Definition.read(path)
    chosen = _model(definition, model)
    given: EventsOf = events_of(events) if events else Past(config.directory, config.history_uri)
    about: dict[str, Any] = {"definition": {"file": definition.file_name, "digest": definition.digest}}
    if isinstance(given, Past):
        about["cluster"] = {"name": given.manifest.cluster_name, "id": given.manifest.cluster_id}
    with _workers(config, definition, chosen, threads, ray) as workers, _bar() as told:
        return write_training_set(
            chosen, labels, given, out, as_of=as_of, knowledge=knowledge, clock=config.clock, incomplete=incomplete,
            workers=workers, about=about, progress=told,
        )  # fmt: skip


def summary(made: Mapping[str, Any]) -> str:
    """Return in words what a training set is, and what is to be known of it."""
    features = sum(len(view["features"]) for view in made["views"].values())
    knowledge = {"event-time": "by event time", "arrival": "as it was known by arrival"}[made["knowledge"]]
    of = f"`{made['model']['name']}`" if made["model"] else "no model"
    text = f"{made['labels']:,} labels with {features} features of {of}, {knowledge}"
    for name, source in made["sources"].items():
        text += f"\n  {source['events']:,} events of `{name}`"
        if source["since"] is not None:
            text += f", kept since {source['since']} only: features without a window begin there"
    if (ahead := made["ahead"]) is not None:
        first = ahead["first"]
        text += (
            f"\n  warning: {ahead['labels']:,} of {made['labels']:,} labels lie ahead of {ahead['now']}, the time by "
            f"the clock; the first is row {first['row']:,}, as of {first['as_of']}: their features are no truth yet, "
            "events may come still"
        )
    return text


def events_of(texts: Sequence[str]) -> dict[str, Path]:
    """Return files by source, given as `SOURCE=FILE`.

    >>> events_of(["purchases=/data/a=b.parquet"])
    {'purchases': PosixPath('/data/a=b.parquet')}
    """
    files: dict[str, Path] = {}
    for text in texts:
        source, separator, file = text.partition("=")
        if not separator or not source or not file:
            raise BadRequest(f"--events: got {text!r:.200}; expected SOURCE=FILE.parquet")
        if source in files:
            raise BadRequest(f"--events: source `{source}` is given twice; put its events into one file")
        files[source] = Path(file)
    return files


def _model(definition: Definition, name: str | None) -> Model:
    models = {model.name: model for model in definition.declared().models}
    if name is None:
        if len(models) != 1:
            raise BadRequest(
                f"definition `{definition.file_name}` has {len(models)} models; name one with `--model`"
                + (f": {', '.join(models)}" if models else "")
            )
        return next(iter(models.values()))
    if name not in models:
        raise NotFound(f"no model `{name[:80]}` in `{definition.file_name}`" + did_you_mean(name[:80], models))
    return models[name]


@contextmanager
def _workers(config: Config, definition: Definition, model: Model, n: int | None, ray: str | None) -> Iterator[Workers]:
    if ray is None:
        yield Threads(n)
        return
    with connected(ray, config), closing(RayWorkers(definition, model.name, n, nice=_NICE if ray == OWN else 0)) as own:
        yield own


@contextmanager
def _bar() -> Iterator[Told]:
    """Show on standard error what is being done."""
    columns = TextColumn("{task.description:20}"), BarColumn(24), TextColumn("{task.fields[note]}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[Stage, TaskID] = {}

        def told(stage: Stage, done: int, of: int | None) -> None:
            if stage not in tasks:
                for before in tasks.values():
                    progress.update(before, total=progress.tasks[before].completed or 1)
                tasks[stage] = progress.add_task(_DOES[stage], total=of, note="")
            progress.update(tasks[stage], completed=done, note=f"{done:,}" + (f" of {of:,}" if of else ""))

        yield told


_DOES: dict[Stage, str] = {
    "labels": "read labels",
    "events": "read events",
    "features": "join them in time",
    "file": "write",
}
