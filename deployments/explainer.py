"""Explaining a score while others are served: in a process of its own, one at a time, with a time limit.

Going through the past of a cluster takes a processor for seconds, and the code of the model runs there once more:
neither has a place in a process that serves.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

from millpond.feature_actors.errors import MillpondError, TooMany, Unavailable, error_from_wire
from millpond.feature_actors.shard_map import ShardMap
from millpond.models.explanation import ExplainRequest

__all__ = ["Explainer", "ExplainTimeout"]


class ExplainTimeout(MillpondError):
    """The past is too long to be gone through in the time that is allowed."""

    code, status = "explain_timeout", 504


@dataclass
class Explainer:
    """Explain scores of the cluster in a data directory. timeout_s: how long one may take."""

    directory: str
    history_uri: str
    shard_map: ShardMap
    timeout_s: float = 60.0
    _busy: bool = False

    async def explain(self, **request: Any) -> bytes:
        """Return what `models.explanation.explained` says, as JSON; arguments as of `ExplainRequest`.

        Raises what that does, `TooMany` if another one is being explained, `ExplainTimeout`.
        """
        if self._busy:
            raise TooMany("explain: another score is being explained; retry", retry_after_ms=1_000)
        asked = msgspec.msgpack.encode(ExplainRequest(self.directory, self.history_uri, **request))
        self._busy = True
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "millpond.models.explanation", stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            try:
                out, _ = await asyncio.wait_for(process.communicate(asked), self.timeout_s)
            except TimeoutError:
                raise ExplainTimeout(
                    f"explain: no answer within {self.timeout_s:g} s (setting `explain_timeout_s`); `millpond explain "
                    "--at TIME` on the cluster's machine has no limit"
                ) from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        finally:
            self._busy = False
        if process.returncode != 0:
            raise Unavailable(
                f"explain: its process ended with {process.returncode}; see the log of the deployment",
                retry_after_ms=1_000,
            )
        answer, error = msgspec.msgpack.decode(out)
        if error is not None:
            raise error_from_wire(error)
        return bytes(answer)
