"""`millpond verify`: logged scores of a cluster, running or stopped, computed again from its past and compared.

Also the gate of `millpond promote --verified`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from millpond.cluster.cluster import or_another
from millpond.cluster.config import Config
from millpond.feature_actors.errors import BadRequest, Unavailable
from millpond.feature_actors.log.part import DAY_MS
from millpond.feature_actors.past import Past
from millpond.models.registry import Registry
from millpond.models.rollout import Rollout, RolloutRefused
from millpond.models.score_log import SCHEMA, read_scores
from millpond.models.verification import CHUNK, Counts, Verification, verify

__all__ = ["VERIFIED_MIN", "check_verified", "past_of", "print_verification", "verify_cluster"]

#: So many scores of a version have to be equal for it to be verified.
VERIFIED_MIN = 100


def verify_cluster(
    config: Config,
    model: str | None = None,
    version: str | None = None,
    *,
    since_ms: int | None = None,
    limit: int | None = None,
) -> Verification:
    """Verify the logged scores of a cluster: of a model or version, those served since a time, the newest `limit`.

    Raises `Unavailable` if it keeps no history, or has no past; `NotFound` if it has no such model or version;
    `BadRequest` for a limit of none.
    """
    if limit is not None and limit < 1:
        raise BadRequest(f"--limit: got {limit}; allowed is 1 or more")
    past = past_of(config)
    assert past.history_uri is not None
    scores = read_scores(past.history_uri, model=model, version=version, since_ms=since_ms, newest_first=True)
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("verify"), MofNCompleteColumn(), TextColumn("scores"), TimeElapsedColumn())
    with (
        closing(Registry(config.directory / "registry")) as registry,
        Progress(
            *columns,
            TextColumn("{task.fields[what]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar,
    ):
        if model is not None:  # one that nobody knows has no score that differs
            registry.versions(model) if version is None else registry.version(model, version)
        task = bar.add_task("verify", total=limit, what="")
        return verify(
            past,
            registry,
            scores if limit is None else _newest(scores, limit),
            progress=lambda n, what: bar.update(task, advance=n, what=what),
        )


def past_of(config: Config) -> Past:
    """Return the past of a cluster, running or stopped. Raises `Unavailable` if it has none."""
    uri = config.history_uri
    if not config.directory.is_dir():
        to_do = or_another(config, "start one with `millpond up`")
        raise Unavailable(f"no cluster `{config.name}` has data in {config.directory}; {to_do}")
    if uri is None:
        raise Unavailable(
            f"cluster `{config.name}` keeps no history (setting `history`), and so no log of its scores; nothing can "
            "be verified or explained"
        )
    return Past(config.directory, uri)


def _newest(tables: Iterable[pa.Table], limit: int) -> Iterator[pa.Table]:
    """Yield the scores that were served last, of tables by date, the newest date first: within one, each writer has
    files of its own."""
    kept, day = SCHEMA.empty_table(), -1
    for table in tables:
        of = table["served_ms"][0].as_py() // DAY_MS
        if of != day and len(kept) >= limit:
            break
        day = of
        kept = pa.concat_tables([kept, table]).sort_by("served_ms")
        kept = kept.slice(max(0, len(kept) - limit))
    if len(kept):
        yield kept


def check_verified(config: Config, rollout: Rollout | None, model: str, version: str | None, least: int) -> str | None:
    """Return the version that would be promoted, which has been verified; None if it is not clear which.

    Raises `RolloutRefused` unless `least` of its logged scores are equal when they are computed again, none different.
    """
    if least < 1:
        raise BadRequest(f"--verified-min: got {least}; allowed is 1 or more: a gate that none has to pass is open")
    if version is None:
        beside = [] if rollout is None else [v for v in (rollout.canary, rollout.shadow) if v is not None]
        if len(beside) != 1:
            return None
        version = beside[0].version
    found = verify_cluster(config, model, version, limit=max(CHUNK, least))
    counts = found.models.get(f"{model}@{version}", Counts())
    subject = f"model `{model}` version `{version}`"
    if counts.different:
        raise RolloutRefused(
            f"{subject}: {counts.different} of its logged scores differ when they are computed again; `millpond verify "
            f"--model {model}` names them; nothing has been changed"
        )
    if counts.equal < least:
        missing = f" ({counts.missing} cannot be computed again)" if counts.missing else ""
        raise RolloutRefused(
            f"{subject}: {counts.equal} of its logged scores are verified{missing}, {least} are needed "
            "(--verified-min); let it answer more as canary or shadow, or log a larger share (`score_log_share`); "
            "nothing has been changed"
        )
    return version


def print_verification(found: Verification) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)  # what differs may look like markup
    table = Table("", "equal", "different", "missing", box=SIMPLE_HEAD, pad_edge=False)
    rows: list[tuple[str, Counts]] = [("scores", found.scores)]
    rows += [(f"model {name}", counts) for name, counts in sorted(found.models.items())]
    rows += [(f"view {name}", counts) for name, counts in sorted(found.views.items())]
    for name, counts in rows:
        table.add_row(name, *(f"{n:,}" for n in (counts.equal, counts.different, counts.missing)))
    console.print(table)
    if found.within_request:
        console.print(f"{found.within_request:,} of the equal were read between two events of one request")
    if found.rounded:
        console.print(f"{found.rounded:,} of the equal have results that differ in rounding")
    for why, n in found.why_missing.items():
        console.print(f"{n:,} missing: {why}")
    for one in found.differences:
        console.print(
            f"different: {one.model} version {one.version} for {one.key}, served at {one.served_ms} as of "
            f"{one.as_of_ms}" + (f" (answer {one.id})" if one.id else ""),
            style="red",
        )
        for what in one.what:
            console.print(f"  {what}")
        for row in one.rows:
            console.print(f"  {row['table']} on shard {row['shard']}, {row['events']:,} events up to {row['offset']}:")
            for event in row["newest"]:
                console.print(f"    {_shown(event)}")
    if not found.scores.equal + found.scores.different + found.scores.missing:
        console.print("no score has been logged (see the settings `score_log_...`)")


def _shown(event: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in event.items())
