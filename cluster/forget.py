"""`millpond forget`: an entity forgotten by the cluster that runs, waited for until nothing of it is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from millpond.cluster.cluster import admin_token, running_cluster
from millpond.cluster.config import Config
from millpond.feature_actors.errors import BadRequest, MillpondError, NotFound, Unauthorized, Unavailable

__all__ = ["forget_entity", "told_in_words"]

#: A call answers when all shards have the tombstone; what it asks for takes as long as it takes.
_ANSWER_S_MAX = 120.0
_LOOK_S = 0.2
_ERRORS: dict[int, type[MillpondError]] = {400: BadRequest, 401: Unauthorized, 404: NotFound}


def forget_entity(
    config: Config, key: Mapping[str, Any], *, only_look: bool = False, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Forget an entity, and return what was removed when it is done; or how far that is, if it is only looked.

    say: told now and then what is being done. Raises `Unavailable` if no cluster runs, or it does not answer, and what
    `Forgetter` does. Whoever waits may go: the cluster goes on, after a restart, too.
    """
    state = running_cluster(config, to_do="start it with `millpond up`: entities are forgotten by a running one")
    url, headers = f"{state['url']}/v1/forget", {"authorization": f"Bearer {admin_token(config.directory)}"}
    with httpx.Client(headers=headers, timeout=_ANSWER_S_MAX) as client:
        told = _asked(url, lambda: client.get(url, params={n: str(v) for n, v in key.items()}))
        if only_look:
            return told
        if told["state"] == "under way":
            say("it was asked for before; this waits for it")
        else:
            told = _asked(url, lambda: client.post(url, json=dict(key)))
        said = ""
        while told["state"] != "done":
            doing = ", ".join(
                f"shard {one['shard']} {one['state']}" for one in told["shards"] if one["state"] != "done"
            )
            if doing != said:
                say(doing)
                said = doing
            time.sleep(_LOOK_S)
            try:
                told = _asked(url, lambda: client.get(url, params={n: str(v) for n, v in key.items()}))
            except Unavailable as error:  # a shard that is being restarted goes on with it then
                say(error.message)
    return told


def _asked(url: str, ask: Callable[[], httpx.Response]) -> dict[str, Any]:
    try:
        answer = ask()
        told = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(f"cluster at {url} does not answer: {error}") from None
    if answer.status_code not in (200, 202):
        why = told["error"]
        raise _ERRORS.get(answer.status_code, Unavailable)(why["message"], path=why["path"])
    return dict(told)


def told_in_words(told: Mapping[str, Any]) -> str:
    ((field, value),) = told["key"].items()
    what = f"{field} {value}"
    if told["state"] == "unknown":
        return f"{what}: nobody has asked to forget it"
    if told["state"] != "done":
        doing = ", ".join(f"shard {one['shard']} {one['state']}" for one in told["shards"])
        return f"{what}: under way, up to {told['up_to']}: {doing}"
    gone = ", ".join(f"{n:,} {name}" for name, n in told["removed"].items())
    return f"{what}: forgotten up to {told['up_to']}; {gone}; what happens later begins afresh"
