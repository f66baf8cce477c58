"""What the figures are held to."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BARS", "Bar"]


@dataclass(frozen=True)
class Bar:
    """A bound of a figure: it is at least, at most, or less than so much."""

    how: str
    bound: float

    def holds(self, value: float) -> bool:
        """Return whether a value is within the bound.

        >>> Bar("<=", 25).holds(25), Bar(">=", 0.9).holds(0.89), Bar("<", 5).holds(5)
        (True, False, False)
        """
        return {">=": value >= self.bound, "<=": value <= self.bound, "<": value < self.bound}[self.how]

    def __str__(self) -> str:
        return f"{self.how} {self.bound:,.10g}"

    def judged(self, value: float) -> str:
        return f"{self} {'ok' if self.holds(value) else 'MISSED'}"


def _at_least(bound: float) -> Bar:
    return Bar(">=", bound)


def _at_most(bound: float) -> Bar:
    return Bar("<=", bound)


#: Of two cores. Bench to figure to its bar.
BARS: dict[str, dict[str, Bar]] = {
    "sketches": {"ingest_events_per_s": _at_least(200_000), "read_1_p50_us": _at_most(50)},
    "store": {
        "ingest_events_per_s_1m": _at_least(1_000_000),
        "read_1_p50_us": _at_most(10),
        "read_1_p99_us": _at_most(30),
        "read_1000_p50_us": _at_most(1_000),
        "read_vs_actor_call_ratio": _at_least(100),
        "read_p99_busy_ratio": _at_most(3),
        "read_10m_vs_10k_ratio": _at_most(3),
        "bytes_per_entity_10m": _at_most(300),
    },
    "events": {
        "arrow_10000_events_per_s": _at_least(300_000),
        "json_1000_events_per_s": _at_least(150_000),
        "single_32_requests_per_s": _at_least(4_000),
        "single_32_p99_ms": _at_most(40),
        "stale_reads": _at_most(0),
        "write_read_pairs": _at_least(10_000),
    },
    "faults": {
        "kills": _at_least(100),
        "acked_events": _at_least(1_000_000),
        "lost_events": _at_most(0),
        "double_counted_events": _at_most(0),
        "availability_other_shards": _at_least(0.999),
    },
    "recovery": {
        "recover_1m_entities_s": _at_most(10),
        "snapshot_1m_entities_s": _at_most(5),
        "ingest_p999_added_ms": _at_most(50),
    },
    "parity": {"different": _at_most(0), "staging_different": _at_most(0)},
    "score": {
        "score_vs_noop_ratio": _at_least(0.90),
        "score_cost_us": _at_most(25),
        "p50_vs_noop_ratio": _at_most(1.25),
        "batch_1000_ids_per_s": _at_least(150_000),
        "score_p99_during_8mb_posts_ratio": _at_most(3),
        "four_models_cost_ratio": _at_most(1.5),
    },
    "models": {
        "models_500_vs_2_ratio": _at_least(0.90),
        "bytes_per_model": _at_most(1_000_000),
        "deploy_to_live_s": _at_most(2),
        "failed_during_deploys": _at_most(0),
    },
    "users": {"users_1m_vs_10k_ratio": _at_least(0.90), "users_10m_vs_10k_ratio": _at_least(0.80)},
    "backfill": {
        "score_p99_ratio": _at_most(2),
        "failed_requests": _at_most(0),
        "events_per_s": _at_least(100_000),
    },
    "trainset": {
        "rows_per_s": _at_least(20_000),
        "peak_mb": _at_most(1_000),
        "seconds_10m_vs_1m_ratio": _at_most(11),
    },
    "soak": {
        "minutes": _at_least(20),
        "replica_growth_mb_per_h": Bar("<", 5),
        "shard_growth_mb_per_h": Bar("<", 5),
        "failed_requests": _at_most(0),
    },
}
