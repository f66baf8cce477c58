"""`millpond explain`: what made a score, down to the raw events; of now, or of any time."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import httpx
from rich.console import Console

from millpond.cluster.cluster import admin_token, running
from millpond.cluster.config import Config
from millpond.cluster.model_commands import open_registry
from millpond.cluster.verify import past_of
from millpond.deployments.answers import iso
from millpond.deployments.served import is_canary
from millpond.feature_actors.errors import BadRequest, NotFound, Unavailable, did_you_mean
from millpond.models.explanation import ExplainRequest, explained
from millpond.models.rollout import Rollout

__all__ = ["explain_score", "key_of", "print_explanation"]

#: How much longer than the cluster may take an answer is waited for.
_ANSWER_S_MAX = 30.0


def key_of(arguments: Sequence[str], given: str | None, command: str = "explain") -> dict[str, Any]:
    """Return the id that flags of a command say, `--user-id 42` for a field `user_id`, or one JSON object."""
    key: Any = {}
    if given is not None:
        try:
            key = json.loads(given, object_pairs_hook=lambda pairs: _once(command, pairs))
        except ValueError:
            key = {}
        if not isinstance(key, dict) or not key:
            raise BadRequest(
                f"--key: got {given!r:.80}; expected an id as a JSON object, such as '{{\"user_id\": 42}}'"
            )
    rest = [part for one in arguments for part in (one.split("=", 1) if one.startswith("--") else [one])]
    flags = []
    for flag, value in zip(rest[::2], rest[1::2], strict=False):
        if not flag.startswith("--"):
            raise BadRequest(f"{command}: got {flag!r:.80}; expected a key field as a flag, such as `--user-id 42`")
        flags.append((flag.removeprefix("--").replace("-", "_"), value))
    if len(rest) % 2:
        raise BadRequest(f"{command}: {rest[-1]!r:.80} has no value; name a key field and its value, `--user-id 42`")
    return _once(command, [*key.items(), *flags])


def _once(command: str, fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an id of some fields. Refuse one that is there twice: whoever gives it means two entities."""
    key: dict[str, Any] = {}
    for name, value in fields:
        if name in key:
            raise BadRequest(f"{command}: `{_flag(name)[:80]}` is given twice; one entity at a time")
        key[name] = value
    return key


def explain_score(
    config: Config,
    model: str,
    key: Mapping[str, Any],
    *,
    at_ms: int | None = None,
    version: str | None = None,
    events_max: int = 5,
) -> dict[str, Any]:
    """Explain a score: as of now by the cluster that runs, else from what is on disk, as of its newest event.

    at_ms: of the newest logged score up to then, or the one that there would have been. Raises `Unavailable` if the
    cluster keeps no history, and what `explained` does.
    """
    if events_max < 0:
        raise BadRequest(f"--events: got {events_max}; allowed is 0 or more")
    past = past_of(config)
    assert past.history_uri is not None
    only = version is not None
    with open_registry(config) as registry:
        registry.versions(model)  # raises if there is none
        if version is None:
            version = _version_for(registry.rollouts().get(model), model, key)
        _check_fields(model, key, registry.version(model, version).key_fields)
    state = running(config.directory)
    if state is not None and at_ms is None and not only:
        # The cluster gives up first, by its own setting, and says so.
        timeout_s = config.explain_timeout_s + _ANSWER_S_MAX
        return _ask(state["url"], admin_token(config.directory), model, key, events_max, timeout_s)
    place = str(config.directory), past.history_uri
    return explained(ExplainRequest(*place, model, version, dict(key), None, at_ms, only, events_max))


def _check_fields(model: str, key: Mapping[str, Any], fields: Collection[str]) -> None:
    """Refuse what is no key field of a model: a flag that is misspelled looks like one."""
    known = [_flag(name) for name in fields]
    for wrong in (_flag(name)[:80] for name in key if name not in fields):
        raise BadRequest(f"explain: `{wrong}` is no key field of model `{model}`" + did_you_mean(wrong, known))


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _version_for(rollout: Rollout | None, model: str, key: Mapping[str, Any]) -> str:
    """Return the version that answers an id."""
    if rollout is None or rollout.champion is None:
        raise NotFound(f"model `{model}`: no version of it is live; name one with --model-version")
    if rollout.canary is None:
        return rollout.champion.version
    kinds = rollout.champion.key_fields
    try:
        typed = {n: [int(v) if kinds[n] == "int64" else v] for n, v in key.items() if n in kinds}
    except (TypeError, ValueError):
        return rollout.champion.version  # whichever: what the key should be is said where it is read
    canary = len(typed) == len(kinds) and is_canary(model, typed, 1, rollout.share)[0]
    return rollout.canary.version if canary else rollout.champion.version


def _ask(url: str, token: str, model: str, key: Mapping[str, Any], events_max: int, timeout_s: float) -> dict[str, Any]:
    query = {**{name: str(value) for name, value in key.items()}, "events": str(events_max)}
    try:
        answer = httpx.get(
            f"{url}/v1/explain/{model}", params=query, headers={"authorization": f"Bearer {token}"}, timeout=timeout_s
        )
        told = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(f"cluster at {url} does not answer: {error}") from None
    if answer.status_code != 200:
        raise BadRequest(told["error"]["message"], path=told["error"]["path"])
    return dict(told)


def print_explanation(told: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)  # what is told of events may look like markup
    key = ", ".join(f"{name} {value}" for name, value in told["key"].items())
    console.print(f"{told['model']} version {told['version']} (owner {told['owner']}) for {key}", style="bold")
    console.print(f"as of {iso(told['as_of_ms'])}: {json.dumps(told['result'])}")
    if told["served_ms"] is not None:
        same = "computed again it is the same" if told["equal"] else "computed again it differs"
        of = f", answer {told['id']}" if told["id"] else ""
        console.print(f"served {iso(told['served_ms'])}{of}; {same}", style=None if told["equal"] else "red")
    for one in told["features"]:
        console.print(f"\n{one['feature']} = {json.dumps(one['value'])}  owner {one['owner']}", style="bold")
        console.print(f"  {one['definition']}")
        console.print(f"  {one['events']:,} events" + (", the newest:" if one["newest"] else ""))
        for event in one["newest"]:
            console.print("    " + ", ".join(f"{name}={value}" for name, value in event.items()))
    if told["unknown"]:
        console.print(f"\nnot known to: {', '.join(told['unknown'])}")
