"""The configuration: one file, over it the environment, over it flags.

`millpond.toml` in the working directory (or `--config FILE`) holds plain `key = value` lines; the
environment variable of `shards` is `MILLPOND_SHARDS`, its flag `--shards`. `millpond config` prints the
result and where each value came from.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from millpond.feature_actors.errors import DeclarationError, MillpondError, did_you_mean
from millpond.feature_actors.source import check_name
from millpond.feature_actors.windows import parse_length_ms

__all__ = ["SECTIONS", "Config", "ConfigError", "load_config"]

#: Variables of ours that are not settings of a cluster.
_OTHER_VARIABLES = frozenset({"MILLPOND_DATASETS", "MILLPOND_EXAMPLES", "MILLPOND_PARITY"})


class ConfigError(MillpondError):
    """A setting is unknown or has a wrong value."""

    code, status = "bad_config", 400


def _setting(default: Any, about: str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"about": about, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """Every setting, its default and its bounds. Lengths of time are texts such as `1h`."""

    name: str = _setting("dev", "of the cluster, and of its folder in data_dir")
    data_dir: str = _setting(".millpond", "where clusters keep their data, a folder each")
    host: str = _setting("127.0.0.1", "address that HTTP listens on")
    port: int = _setting(8000, "HTTP port; another one if it is taken", 0, 65_535)
    proxy: Literal["haproxy", "serve"] = _setting("haproxy", "the fast ingress, or Serve's own proxy")
    #: On two cores a second shard makes a score of several keys slower: README, decisions.
    shards: int = _setting(max(1, (os.cpu_count() or 1) // 2), "feature actors; one for every two cores", 1, 1_024)
    slots: int = _setting(256, "slots of the shard map; fixed at the first start", 1, 4_096)
    durability: Literal["sync", "process", "none"] = _setting(
        "sync", "what acked events survive: power loss, a process' end, or nothing"
    )
    snapshot_mb: int = _setting(
        256,
        "growth of a log until the next snapshot, or the size of the last one if that is more",
        1,
        10**6,
    )
    history: str = _setting(
        "auto", "Parquet of past events: `auto` is in data_dir, `off`, or a URI of `pyarrow.fs`, of this cluster alone"
    )
    history_part_mb: int = _setting(1_024, "size of a part of the history", 1, 10**6)
    score_log_share: float = _setting(0.01, "share of ids whose scores are logged, 0 to 1", 0, 1)
    score_log_flush_s: float = _setting(5.0, "how often a replica writes them", 0.01, 3_600)
    score_log_flush_rows: int = _setting(1_000, "with so many it writes them at once", 1, 10**6)
    score_log_waiting_max: int = _setting(100_000, "so many may wait; more are dropped", 1, 10**7)
    score_log_retention: str = _setting("365d", "how long they are kept")
    disk_free_mb_min: int = _setting(256, "with less left on disk no events are taken", 0, 10**9)
    queue_mb_max: int = _setting(256, "of events may wait for a shard; more are 429", 1, 10**6)
    queue_events_max: int = _setting(2_000_000, "events may wait in a replica; more are 429", 1, 10**9)
    memory_dir: str = _setting("auto", "of features: `auto` is /dev/shm, or if that is small data_dir")
    memory_mb_max: int = _setting(16_384, "most that the tiles of one shard take", 1, 32_768)
    strings_max: int = _setting(1_000_000, "distinct strings a shard keeps for features", 0, 10**8)
    replicas: int = _setting(1, "replicas of the events app and of the score app", 1, 1_024)
    clock: Literal["wall", "event"] = _setting("wall", "time: the machine's, or the newest arrival's")
    late_after: str = _setting("1h", "further behind its arrival an event is late")
    ahead_max: str = _setting("10m", "further ahead of its arrival it is refused")
    dedupe_horizon: str = _setting("24h", "how long the id of an event is remembered")
    dedupe_horizon_min: str = _setting("1h", "but no shorter: then events are refused (429)")
    dedupe_mb_max: int = _setting(2_048, "most memory for the ids of one shard", 1, 10**6)
    event_body_bytes_max: int = _setting(16 * 2**20, "largest body of events", 1_024, 2**31)
    event_rows_max: int = _setting(1_000_000, "most events in a body", 1, 16_000_000)
    score_body_bytes_max: int = _setting(4 * 2**20, "largest body of ids", 1_024, 2**31)
    score_ids_max: int = _setting(10_000, "most ids in a score request", 1, 10**7)
    requests_ongoing_max: int = _setting(256, "requests that a replica works on at once", 1, 10**6)
    requests_queued_max: int = _setting(1_024, "requests that wait for a replica; more are 503", 1, 10**6)
    predict_timeout_s: float = _setting(2.0, "longest wait for a slow model; over it is 504", 0.001, 3_600)
    hang_timeout_s: float = _setting(10.0, "a model that holds up a replica so long ends it", 0.1, 3_600)
    model_requests_max: int = _setting(128, "may wait for a slow model; more are 429", 1, 10**6)
    predict_threads: int = _setting(64, "threads of a replica for its slow models", 1, 1_024)
    load_timeout_s: float = _setting(60.0, "longest that a model may take to load", 0.001, 3_600)
    models_mb_max: int = _setting(4_096, "memory for models in a replica; the idlest go", 1, 10**6)
    shard_timeout_s: float = _setting(30.0, "longest wait for one call of a shard", 0.01, 3_600)
    explain_timeout_s: float = _setting(60.0, "longest wait for the explanation of a score", 0.1, 86_400)
    body_timeout_s: float = _setting(30.0, "how long a request's body may take to arrive", 0.01, 3_600)
    draining_period_s: float = _setting(2.0, "how long a replaced replica still answers", 0, 3_600)
    drain_timeout_s: float = _setting(60.0, "how long a stop waits for last snapshots", 0.01, 3_600)
    object_store_mb: int = _setting(100, "shared memory of Ray, for large calls", 80, 10**6)

    @property
    def directory(self) -> Path:
        """The data directory of this cluster."""
        return Path(self.data_dir).absolute() / self.name

    @property
    def history_uri(self) -> str | None:
        """Where the history is, a folder of this cluster alone; None if there is none."""
        return {"off": None, "auto": str(self.directory / "history")}.get(self.history, self.history)

    @property
    def late_after_ms(self) -> int:
        return _length_ms("late_after", self.late_after)

    @property
    def ahead_ms_max(self) -> int:
        return _length_ms("ahead_max", self.ahead_max)

    @property
    def dedupe_horizon_ms(self) -> int:
        return _length_ms("dedupe_horizon", self.dedupe_horizon)

    @property
    def score_log_retention_ms(self) -> int:
        return _length_ms("score_log_retention", self.score_log_retention)

    @property
    def dedupe_horizon_ms_min(self) -> int:
        return _length_ms("dedupe_horizon_min", self.dedupe_horizon_min)


#: Every setting once, as people look for them; what nearly everybody needs comes first.
SECTIONS: dict[str, tuple[str, ...]] = {
    "cluster": ("name", "data_dir", "host", "port", "shards", "replicas", "durability", "clock", "history"),
    "events": ("late_after", "ahead_max", "dedupe_horizon", "dedupe_horizon_min", "dedupe_mb_max",
               "event_body_bytes_max", "event_rows_max", "queue_mb_max", "queue_events_max"),
    "models and scores": ("score_ids_max", "score_body_bytes_max", "predict_timeout_s", "hang_timeout_s",
                          "model_requests_max", "predict_threads", "load_timeout_s", "models_mb_max"),
    "log of scores": ("score_log_share", "score_log_retention", "score_log_flush_s", "score_log_flush_rows",
                      "score_log_waiting_max"),
    "disk and memory": ("disk_free_mb_min", "snapshot_mb", "history_part_mb", "memory_dir", "memory_mb_max",
                        "strings_max", "slots", "object_store_mb"),
    "requests": ("proxy", "requests_ongoing_max", "requests_queued_max", "body_timeout_s", "shard_timeout_s",
                 "explain_timeout_s", "draining_period_s", "drain_timeout_s"),
}  # fmt: skip

_TYPES = get_type_hints(Config)
#: The settings that are lengths of time, and the shortest that each may be.
_LENGTHS = {
    "late_after": "0s",
    "ahead_max": "0s",
    "dedupe_horizon": "1s",
    "dedupe_horizon_min": "1s",
    "score_log_retention": "1d",
}
_LENGTH_MAX = "3660d"


def load_config(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> tuple[Config, dict[str, str]]:
    """Return the configuration and, for each setting, where its value came from.

    file: a TOML file that must exist; by default `millpond.toml`, if it does.
    Raises `ConfigError` that names the setting, its value, what is allowed and where it stands.
    """
    environment = os.environ if environment is None else environment
    layers: list[tuple[str, dict[str, Any]]] = []
    path = file or Path("millpond.toml")
    if file is not None or path.is_file():
        layers.append((str(path), _read_file(path)))
    variables = {
        name.removeprefix("MILLPOND_").lower(): (name, text)
        for name, text in environment.items()
        if name.startswith("MILLPOND_") and name not in _OTHER_VARIABLES
    }
    for key, (name, text) in variables.items():
        layers.append((f"environment {name}", {key: text}))
    for key, value in (flags or {}).items():
        if value is not None:
            layers.append((f"flag --{key.replace('_', '-')}", {key: value}))

    values: dict[str, Any] = {}
    origins = {f.name: "default" for f in fields(Config)}
    for origin, layer in layers:
        for key, value in layer.items():
            if key not in origins:
                raise ConfigError(f"no setting `{key}`" + did_you_mean(key, origins), path=origin)
            values[key] = _check(key, value, origin)
            origins[key] = origin
    config = Config(**values)
    if origins["shards"] == "default":  # of the machine, which may have more cores than there are slots
        config = replace(config, shards=min(config.shards, config.slots))
    if config.dedupe_horizon_ms_min > config.dedupe_horizon_ms:
        if origins["dedupe_horizon_min"] != "default":
            raise ConfigError(
                f"setting `dedupe_horizon_min`: {config.dedupe_horizon_min} is more than {config.dedupe_horizon} "
                "(setting `dedupe_horizon`), which is how long ids are remembered at most",
                path=origins["dedupe_horizon_min"],
            )
        config = replace(config, dedupe_horizon_min=config.dedupe_horizon)
    if config.shards > config.slots:
        raise ConfigError(
            f"setting `shards`: {config.shards} shards of {config.slots} slots (setting `slots`); a shard needs a "
            "slot at least",
            path=origins["shards"],
        )
    if ":" in config.host and config.proxy == "haproxy":
        raise ConfigError(
            f"setting `host`: {config.host} is an address of IPv6, on which HAProxy does not listen as Serve sets it "
            'up; name one of IPv4, or take `proxy = "serve"`',
            path=origins["host"],
        )
    return config, origins


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"configuration `{path}`: cannot be read: {error}") from None


def _check(key: str, value: Any, origin: str) -> Any:
    """Return a value as the type of its setting, or raise."""
    kind = _TYPES[key]
    spec = next(f for f in fields(Config) if f.name == key)
    if choices := get_args(kind):
        if value not in choices:
            raise ConfigError(f"setting `{key}`: {value!r} is not one of {', '.join(choices)}", path=origin)
        return value
    if kind in (int, float):
        try:
            number = kind(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if isinstance(number, bool) or not isinstance(number, (int, kind)):
            raise ConfigError(f"setting `{key}`: expected {kind.__name__}, got {value!r}", path=origin)
        low, high = spec.metadata["low"], spec.metadata["high"]
        if not low <= number <= high:
            raise ConfigError(f"setting `{key}`: {number} is not between {low} and {high}", path=origin)
        return kind(number)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"setting `{key}`: expected text, got {value!r}", path=origin)
    try:
        if key == "name":
            check_name("cluster", value)
    except DeclarationError as error:
        raise ConfigError(error.message, path=origin) from None
    if key in _LENGTHS:
        _length_ms(key, value, origin)
    return value


def _length_ms(key: str, text: str, origin: str | None = None) -> int:
    """Return a setting that is a length of time in milliseconds, or raise."""
    length_ms = parse_length_ms(text)
    low_ms, high_ms = parse_length_ms(_LENGTHS[key]), parse_length_ms(_LENGTH_MAX)
    assert low_ms is not None
    assert high_ms is not None
    if length_ms is None or not low_ms <= length_ms <= high_ms:
        raise ConfigError(
            f"setting `{key}`: expected a length such as `90s`, `30m`, `24h`, at least `{_LENGTHS[key]}`, at most "
            f"`{_LENGTH_MAX}`, got {text!r}",
            path=origin,
        )
    return length_ms
