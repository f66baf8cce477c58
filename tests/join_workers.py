"""Workers of a join that are apart, as those of Ray are, but in this process: what they are told has been pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from millpond.feature_actors.layout import Layout
from millpond.feature_actors.plan import Answer
from millpond.models.training.workers import JoinShard, Piece, SentPiece, put_share

T = TypeVar("T")


@dataclass(frozen=True)
class Apart:
    """n workers; lost_after: so many pieces, then all begin again."""

    n: int
    lost_after: int = 0

    def answers(self, layout: Layout, pieces: Callable[[], Iterator[Piece]]) -> Iterator[tuple[Piece, Answer]]:
        answered = 0
        for lost_after in (self.lost_after, -1):
            shards: list[JoinShard] = []
            for number, piece in enumerate(pieces()):
                if number == lost_after:
                    break
                if not shards:
                    shards = [JoinShard(layout, piece.question.program, n, self.n) for n in range(self.n)]
                answer = Answer.empty(piece.question)
                answer.values.fill(-1e99)  # what nobody puts there is seen
                for n, shard in enumerate(shards):
                    put_share(_sent(shard.share(_sent(SentPiece.of(piece)))), piece.question, answer, n, self.n)
                if number >= answered:
                    answered += 1
                    yield piece, answer
            else:
                return


def _sent(what: T) -> T:
    back: T = pickle.loads(pickle.dumps(what))
    return back
