# ruff: noqa: E501  (messages stand whole)
"""Configuration: one file, the environment over it, flags over that; a mistake is named with its place."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from millpond.cluster import cli
from millpond.cluster.config import SECTIONS, Config, ConfigError, load_config
from millpond.feature_actors.tiles.memory import started_ticks

FIELDS = [f.name for f in fields(Config)]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No millpond.toml and no MILLPOND_ variables but those of the test."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("MILLPOND_")]:
        monkeypatch.delenv(name)


def write(tmp_path: Path, text: str, name: str = "millpond.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_without_anything_every_setting_is_its_default() -> None:
    config, origins = load_config(environment={})
    assert config == Config()
    assert origins == dict.fromkeys(FIELDS, "default")


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    write(tmp_path, 'shards = 3\nslots = 16\nport = 1\nname = "staging"\n')
    config, origins = load_config(
        environment={"MILLPOND_SHARDS": "4", "MILLPOND_PORT": "2", "HOME": "/"}, flags={"port": "3", "host": None}
    )
    assert (config.name, config.slots, config.shards, config.port) == ("staging", 16, 4, 3)
    assert {k: v for k, v in origins.items() if v != "default"} == {
        "name": "millpond.toml", "slots": "millpond.toml", "shards": "environment MILLPOND_SHARDS", "port": "flag --port",
    }  # fmt: skip


def test_a_named_file_is_read_in_place_of_the_one_that_lies_here(tmp_path: Path) -> None:
    write(tmp_path, "shards = 3\n")
    other = write(tmp_path, "slots = 16\n", "other.toml")
    config, origins = load_config(other, environment={})
    assert (config.shards, config.slots, origins["slots"]) == (Config().shards, 16, str(other))


def test_every_setting_can_come_from_the_environment_as_text() -> None:
    for field in fields(Config):
        config, origins = load_config(environment={f"MILLPOND_{field.name.upper()}": str(field.default)})
        assert getattr(config, field.name) == field.default
        assert type(getattr(config, field.name)) is type(field.default)
        assert origins[field.name] == f"environment MILLPOND_{field.name.upper()}"


def test_variables_that_are_no_settings_of_a_cluster_are_left_alone() -> None:
    assert load_config(environment={"MILLPOND_DATASETS": "/x", "MILLPOND_EXAMPLES": "2"})[0] == Config()


def test_every_number_has_bounds_that_its_default_keeps() -> None:
    for field in fields(Config):
        if type(field.default) in (int, float):
            assert field.metadata["low"] <= field.default <= field.metadata["high"], field.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shard = 2", "no setting `shard`; known: `ahead_max`, `body_timeout_s`, `clock`, `data_dir`, `dedupe_horizon`, `dedupe_horizon_min`, `dedupe_mb_max`, `disk_free_mb_min`, `drain_timeout_s`, `draining_period_s`, `durability`, `event_body_bytes_max`, `event_rows_max`, `explain_timeout_s`, `hang_timeout_s`, `history`, `history_part_mb`, `host`, `late_after`, `load_timeout_s`, ...; did you mean `shards`? - at `millpond.toml`"),
        ("shards = 0", "setting `shards`: 0 is not between 1 and 1024 - at `millpond.toml`"),
        ("shards = 1025", "setting `shards`: 1025 is not between 1 and 1024 - at `millpond.toml`"),
        ('shards = "two"', "setting `shards`: expected int, got 'two' - at `millpond.toml`"),
        ("shards = 2.5", "setting `shards`: expected int, got 2.5 - at `millpond.toml`"),
        ("shards = true", "setting `shards`: expected int, got True - at `millpond.toml`"),
        ("shard_timeout_s = nan", "setting `shard_timeout_s`: nan is not between 0.01 and 3600 - at `millpond.toml`"),
        ('proxy = "nginx"', "setting `proxy`: 'nginx' is not one of haproxy, serve - at `millpond.toml`"),
        ("clock = 5", "setting `clock`: 5 is not one of wall, event - at `millpond.toml`"),
        ('host = ""', "setting `host`: expected text, got '' - at `millpond.toml`"),
        ("data_dir = 5", "setting `data_dir`: expected text, got 5 - at `millpond.toml`"),
        ('name = "../evil"', "cluster '../evil': a name is lower-case letters, digits and `_`, starts with a letter and has at most 63 characters - at `millpond.toml`"),
        ('late_after = "1 hour"', "setting `late_after`: expected a length such as `90s`, `30m`, `24h`, at least `0s`, at most `3660d`, got '1 hour' - at `millpond.toml`"),
        ('late_after = "-1s"', "setting `late_after`: expected a length such as `90s`, `30m`, `24h`, at least `0s`, at most `3660d`, got '-1s' - at `millpond.toml`"),
        ('ahead_max = "3661d"', "setting `ahead_max`: expected a length such as `90s`, `30m`, `24h`, at least `0s`, at most `3660d`, got '3661d' - at `millpond.toml`"),
        ('dedupe_horizon = "999ms"', "setting `dedupe_horizon`: expected a length such as `90s`, `30m`, `24h`, at least `1s`, at most `3660d`, got '999ms' - at `millpond.toml`"),
        ('dedupe_horizon_min = "0s"', "setting `dedupe_horizon_min`: expected a length such as `90s`, `30m`, `24h`, at least `1s`, at most `3660d`, got '0s' - at `millpond.toml`"),
        ('host = "::1"', "setting `host`: ::1 is an address of IPv6, on which HAProxy does not listen as Serve sets it up; name one of IPv4, or take `proxy = \"serve\"` - at `millpond.toml`"),
        ('dedupe_horizon_min = "25h"', "setting `dedupe_horizon_min`: 25h is more than 24h (setting `dedupe_horizon`), which is how long ids are remembered at most - at `millpond.toml`"),
        ('dedupe_horizon = "1h"\ndedupe_horizon_min = "61m"', "setting `dedupe_horizon_min`: 61m is more than 1h (setting `dedupe_horizon`), which is how long ids are remembered at most - at `millpond.toml`"),
        ("late_after = 5", "setting `late_after`: expected text, got 5 - at `millpond.toml`"),
        ("slots = 4097", "setting `slots`: 4097 is not between 1 and 4096 - at `millpond.toml`"),
        ("shards = 257", "setting `shards`: 257 shards of 256 slots (setting `slots`); a shard needs a slot at least - at `millpond.toml`"),
        ("slots = 4\nshards = 5", "setting `shards`: 5 shards of 4 slots (setting `slots`); a shard needs a slot at least - at `millpond.toml`"),
        ("[cluster]\nshards = 2", "no setting `cluster`; known: "),
        ("shards = ", "configuration `millpond.toml`: cannot be read: "),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(environment={})
    assert str(caught.value).startswith(message)
    if "cannot be read" not in message:
        assert caught.value.path == "millpond.toml"


def test_a_mistake_in_the_environment_and_in_a_flag_is_named_with_its_place() -> None:
    with pytest.raises(
        ConfigError, match=r"^no setting `shardz`; .*did you mean `shards`\? - at `environment MILLPOND_SHARDZ`$"
    ):
        load_config(environment={"MILLPOND_SHARDZ": "2"})
    with pytest.raises(ConfigError, match=r"^setting `slots`: 0 is not between 1 and 4096 - at `flag --slots`$"):
        load_config(environment={}, flags={"slots": "0"})


@pytest.mark.parametrize("content", [None, b"\xff", "folder"])
def test_a_named_file_that_cannot_be_read_is_an_error(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "x.toml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(ConfigError, match=f"^configuration `{re.escape(str(path))}`: cannot be read: "):
        load_config(path, environment={})


def test_the_data_directory_is_that_of_the_clusters_name(tmp_path: Path) -> None:
    assert Config().directory == tmp_path / ".millpond" / "dev"
    assert Config(name="staging", data_dir="/data").directory == Path("/data/staging")
    lengths = Config(late_after="2h", ahead_max="1s", dedupe_horizon="7d")
    assert (lengths.late_after_ms, lengths.ahead_ms_max, lengths.dedupe_horizon_ms) == (7_200_000, 1_000, 604_800_000)


def test_an_event_may_be_late_at_once_and_not_ahead_at_all() -> None:
    config, _ = load_config(environment={"MILLPOND_LATE_AFTER": "0s", "MILLPOND_AHEAD_MAX": "500ms"})
    assert (config.late_after_ms, config.ahead_ms_max) == (0, 500)


def test_the_least_horizon_is_that_of_the_ids_if_that_is_shorter_and_nobody_says_otherwise() -> None:
    config, origins = load_config(environment={}, flags={"dedupe_horizon": "10m"})
    assert (config.dedupe_horizon_min, config.dedupe_horizon_ms_min) == ("10m", 600_000)
    assert origins["dedupe_horizon_min"] == "default"
    config, _ = load_config(environment={}, flags={"dedupe_horizon": "10m", "dedupe_horizon_min": "600s"})
    assert config.dedupe_horizon_ms_min == config.dedupe_horizon_ms


def test_as_many_shards_as_slots_are_allowed_and_the_default_is_not_more() -> None:
    assert load_config(environment={}, flags={"slots": "1"})[0].shards == 1
    config, _ = load_config(environment={}, flags={"shards": "8", "slots": "8"})
    assert (config.shards, config.slots) == (8, 8)


# -- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_config_prints_each_setting_and_where_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "slots = 16\n")
    monkeypatch.setenv("MILLPOND_REPLICAS", "3")
    status, out, err = run(capsys, "config", "--shards", "5", "--name=staging")
    lines = dict(re.fullmatch(r"(\w+) += (.*)", line).groups() for line in out.splitlines())  # type: ignore[union-attr, misc]
    assert (status, err, list(lines)) == (0, "", FIELDS)
    said: dict[str, tuple[Any, str]] = {
        name: (json.loads(text.split(" # ")[0]), text.split(" # ")[1]) for name, text in lines.items()
    }
    assert said["shards"] == (5, "flag --shards")
    assert said["name"] == ("staging", "flag --name")
    assert said["replicas"] == (3, "environment MILLPOND_REPLICAS")
    assert said["slots"] == (16, "millpond.toml")
    assert said["proxy"] == ("haproxy", "default")


def help_of(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a terminal of 80 columns shows."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("command", ["up", "demo", "config", "bench"])
def test_a_command_that_starts_a_cluster_shows_each_setting_in_its_section(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = help_of(command, capsys, monkeypatch)
    shown = " ".join(" ".join(lines).split())
    at = [shown.index(f" {title}: ") for title in SECTIONS]
    assert at == sorted(at)
    assert sorted(sum(map(list, SECTIONS.values()), [])) == sorted(FIELDS)  # noqa: RUF017
    for field in fields(Config):
        (section,) = (title for title, names in SECTIONS.items() if field.name in names)
        assert shown.index(f" --{field.name.replace('_', '-')} ") > shown.index(f" {section}: ")
        assert field.metadata["about"] in shown


@pytest.mark.parametrize("command", ["status", "down", "deploy", "explain", "train-set"])
def test_any_other_command_shows_how_a_cluster_is_found_and_takes_each_setting(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = "\n".join(help_of(command, capsys, monkeypatch))
    assert {name for name in FIELDS if f"--{name.replace('_', '-')} " in shown} == {"name", "data_dir"}
    options = cli._parser().parse_args(["status", *(f"--{name.replace('_', '-')}=1" for name in FIELDS)])
    assert {getattr(options, name) for name in FIELDS} == {"1"}


@pytest.mark.parametrize("command", ["", "up", "demo", "bench", "train-set", "verify", "explain", "replay", "check"])
def test_help_fits_a_terminal_and_begins_with_what_is_its_own(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = help_of(command, capsys, monkeypatch)
    assert max(map(len, lines)) <= 80
    assert lines.index("") <= 8  # the usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "--shards", "x"], "millpond: setting `shards`: expected int, got 'x' - at `flag --shards`\n"),
        (["config", "--config", "none.toml"], "millpond: configuration `none.toml`: cannot be read: [Errno 2] No such file or directory: 'none.toml'\n"),
        (["up", "none.py", "--shards", "300"], "millpond: setting `shards`: 300 shards of 256 slots (setting `slots`); a shard needs a slot at least - at `flag --shards`\n"),
        (["status"], "millpond: no cluster `dev` runs on {here}/.millpond/dev; start one with `millpond up`\n"),
        (["down", "--name", "staging"], "millpond: no cluster `staging` runs on {here}/.millpond/staging; start one with `millpond up`\n"),
        (["up", "none.py"], "millpond: definition `none.py`: cannot be read: [Errno 2] No such file or directory: 'none.py'\n"),
    ],
)  # fmt: skip
def test_an_error_of_a_command_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(capsys, *arguments) == (1, "", message.format(here=tmp_path))
    assert not (tmp_path / ".millpond").exists()


def test_where_another_cluster_runs_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same data directory; one that was killed is not."""
    pid = os.getpid()
    for name, ticks in (("dev2", started_ticks(pid)), ("killed", 1)):
        folder = tmp_path / ".millpond" / name
        folder.mkdir(parents=True)
        state = {"pid": pid, "started_ticks": ticks, "url": f"http://127.0.0.1:8001/{name}"}
        (folder / "cluster.json").write_text(json.dumps(state))
    here = f"{tmp_path}/.millpond"
    others = "running here: `dev2` at http://127.0.0.1:8001/dev2; say which with `--name`, or"
    runs_not = f"no cluster `dev` runs on {here}/dev; {others}"
    for arguments, message in (
        (["status"], f"{runs_not} start one with `millpond up`"),
        (["down"], f"{runs_not} start one with `millpond up`"),
        (["models"], f"no cluster `dev` has models in {here}/dev; {others} start one with `millpond up`"),
        (["verify"], f"no cluster `dev` has data in {here}/dev; {others} start one with `millpond up`"),
        (["forget", "--user-id", "1"], f"{runs_not} start it with `millpond up`: entities are forgotten by a running one"),
        (["export", "-o", "pack"], f"export: {runs_not} name its definition files, or start it"),
    ):  # fmt: skip
        assert run(capsys, *arguments) == (1, "", f"millpond: {message}\n")


def test_up_refuses_a_setting_that_is_none_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLPOND_SHARD", "2")
    status, out, err = run(capsys, "up", "none.py")
    assert (status, out) == (1, "")
    assert err.startswith("millpond: no setting `shard`; known: ")
    assert err.endswith("did you mean `shards`? - at `environment MILLPOND_SHARD`\n")


def test_up_with_a_model_that_is_not_trained_fails_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from apps import DEFINITION

    (tmp_path / "defs.py").write_text(DEFINITION.replace("artifacts={}", 'artifacts={"weights": "weights.npy"}'))
    status, out, err = run(capsys, "up", "defs.py")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        "millpond: model `churn`: artifact `weights` is `weights.npy`, which does not lie beside `defs.py`; train the model first"
    )
    assert not (tmp_path / ".millpond").exists()
